/** What an answer took, in numbers with bars: visual tokens, the router's probabilities, words, seconds. */

import { $, bar, el, format } from "./dom.js";

const WORDS = 12; // shown; the others share a line
const WAITED = 0.05; // seconds from which on waiting is told

const STAGES = [
  ["preprocess", "Preprocess"],
  ["vision", "Vision tower"],
  ["router", "Router"],
  ["prefill", "Prefill"],
];

/** Why a granularity was chosen, by what the server calls the source. */
const REASONS = /** @type {Record<string, string>} */ ({
  router: "the router’s choice",
  cost: "the router’s choice after the cost of tokens",
  forced: "as you chose",
  budget: "the best within the budget",
  finest: "the finest, since this model has no router",
});

/**
 * Show the numbers of an answer.
 * @param {import("./conversation.js").Answer | null} answer
 * @param {number} which of the conversation's pictures
 * @param {any} [evidence] for its granularity over another one
 */
export function showNumbers(answer, which, evidence) {
  const view = answer?.avg?.images[which];
  $("numbers").hidden = !view;
  if (!answer || !view) return;
  const seen = answer.seen[which];
  $("numbers").replaceChildren(
    ...tokens(view, answer.avg),
    ...(view.probabilities ? [probabilities(view, seen?.visual_tokens_at ?? {})] : []),
    ...(evidence ? [words(evidence, seen.explanation.votes.words)] : []),
    times(answer),
    ...reuse(answer.avg),
  );
}

/** @param {any} view @param {any} avg */
function tokens(view, avg) {
  const { visual_tokens: taken, visual_tokens_finest: finest } = view;
  const load = avg.under_load ? " Many requests wait, so it looks less closely." : "";
  return [
    el("p", { className: "total" }, el("strong", {}, format.count(taken)), ` of ${format.count(finest)} visual tokens`),
    bar(taken / finest, "accent"),
    el("p", { className: "hint" }, `Granularity ${view.granularity}, ${REASONS[view.source]}.${load}`),
  ];
}

/** A table whose caption is its heading. @param {string} caption @param {string[]} heads @param {any[]} rows */
function table(caption, heads, rows) {
  const head = el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text)));
  return el(
    "table",
    {},
    el("caption", {}, caption),
    el("thead", { className: "unseen" }, head),
    el("tbody", {}, ...rows),
  );
}

/** @param {string} name @param {Node} drawn @param {string[]} cells @param {string} kind */
const row = (name, drawn, cells, kind = "") =>
  el(
    "tr",
    { className: kind },
    el("th", { scope: "row" }, name),
    el("td", { className: "drawn" }, drawn),
    ...cells.map((text) => el("td", {}, text)),
  );

/** @param {any} view @param {Record<string, number>} counts visual tokens at each granularity */
function probabilities(view, counts) {
  const rows = Object.entries(view.probabilities).map(([granularity, share]) => {
    const chosen = Number(granularity) === view.granularity;
    const count = granularity in counts ? `${format.count(counts[granularity])} tokens` : "";
    return row(granularity, bar(share, chosen ? "accent" : ""), [format.percent(share), count], chosen ? "chosen" : "");
  });
  return table("What the router thinks", ["Granularity", "Bar", "Probability", "Visual tokens"], rows);
}

/** @param {any} evidence @param {{position: number, text: string}[]} kept */
function words(evidence, kept) {
  const all = kept
    .map((word, n) => ({ ...word, value: evidence.words[n] }))
    .sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const bars = all
    .slice(0, WORDS)
    .sort((a, b) => a.position - b.position)
    .map(({ text, value }) => ({ text: readable(text), value, kind: "" }));
  const others = all.slice(WORDS);
  const sum = others.reduce((total, { value }) => total + value, 0);
  if (others.length) bars.push({ text: `${others.length} others`, value: sum, kind: "" });
  bars.push({ text: "the picture", value: evidence.image, kind: "apart" });
  bars.push({ text: "before seeing", value: evidence.bias + evidence.unfilled, kind: "" });
  bars.push({ text: "together", value: evidence.total, kind: "sum" });
  const most = Math.max(...bars.map(({ value }) => Math.abs(value))) || 1;
  const rows = bars.map(({ text, value, kind }) => row(text, twoSided(value / most), [format.signed(value)], kind));
  return table(`What speaks for ${evidence.for} over ${evidence.over}`, ["What", "Bar", "Evidence in logits"], rows);
}

/** A bar that goes left or right from the middle. @param {number} share from −1 to 1 */
function twoSided(share) {
  const drawn = bar(Math.abs(share) / 2, share < 0 ? "against" : "for");
  drawn.classList.add("two");
  return drawn;
}

/** @param {string} text */
const readable = (text) => text.trim() || text.replaceAll("\n", "⏎").replaceAll(" ", "␣");

/** @param {import("./conversation.js").Answer} answer */
function times({ avg, usage }) {
  const { timings } = avg;
  const speed = timings.generation_tokens_per_second;
  const rows = STAGES.filter(([stage]) => stage in timings).map(([stage, name]) => ({ name, seconds: timings[stage] }));
  if (timings.waited >= WAITED) rows.unshift({ name: "Waiting", seconds: timings.waited });
  if (speed && usage)
    rows.push({ name: `Answer, ${speed.toFixed(0)} tokens/s`, seconds: (usage.completion_tokens - 1) / speed });
  const most = Math.max(...rows.map(({ seconds }) => seconds));
  return table(
    "Time",
    ["Stage", "Bar", "Seconds"],
    rows.map(({ name, seconds }) => row(name, bar(seconds / most), [format.seconds(seconds)])),
  );
}

/** @param {any} avg */
function reuse({ images, counters }) {
  const told = [];
  const known = images.length - counters.vision_calls;
  if (known)
    told.push(
      images.length > 1 ? `${known} of ${images.length} pictures were seen before.` : "The picture was seen before.",
    );
  if (counters.reused) {
    told.push(
      `${format.count(counters.reused)} of ${format.count(counters.reused + counters.prefilled)} positions of the prompt were there already.`,
    );
  }
  return told.length ? [el("p", { className: "hint reused" }, `Reused: ${told.join(" ")}`)] : [];
}

/** Seconds that an answer took, without seeing the picture, which answers that are compared share. @param {any} answer */
export function secondsAfterSeeing({ avg, usage }) {
  const { router, prefill, generation_tokens_per_second: speed } = avg.timings;
  return router + prefill + (speed ? (usage.completion_tokens - 1) / speed : 0);
}
