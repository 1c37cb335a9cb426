/** Questions and answers as they are read: on the page, and by screen readers. */

import { $, bar, el, format } from "./dom.js";
import { secondsAfterSeeing } from "./numbers.js";

/**
 * @typedef {import("./conversation.js").Answer} Answer
 * @typedef {import("./conversation.js").Turn} Turn
 */

/** @type {WeakMap<Answer, {text: Text, meta: HTMLElement}>} where each answer is written */
const written = new WeakMap();

/**
 * Write all turns anew. A button says in its data which turn it is about, and which answer.
 * @param {Turn[]} turns
 * @param {Answer | null} selected whose numbers are shown
 * @param {boolean} running whether the last one is being answered, and is to be seen
 */
export function showTranscript(turns, selected, running) {
  const buttons = () => [...$("transcript").querySelectorAll("button")];
  const focused = buttons().findIndex((button) => button === document.activeElement);
  $("transcript").hidden = turns.length === 0;
  $("transcript").replaceChildren(...turns.map((turn, n) => turnItem(turn, n, selected)));
  buttons()[focused]?.focus({ preventScroll: true });
  if (running) $("transcript").lastElementChild?.scrollIntoView({ block: "nearest" });
}

/** @param {Turn} turn @param {number} n @param {Answer | null} selected */
function turnItem(turn, n, selected) {
  const asked = el("p", { className: "asked" }, turn.question);
  if (turn.picture) asked.prepend(el("img", { src: turn.picture.uri, alt: turn.picture.name }));
  const answers = turn.answers.map((answer, k) => answerBox(turn, answer, answer === selected, { turn: n, answer: k }));
  return el("li", {}, asked, el("div", { className: answers.length > 1 ? "answers two" : "answers" }, ...answers));
}

/** @param {Turn} turn @param {Answer} answer @param {boolean} selected @param {{turn: number, answer: number}} place */
function answerBox(turn, answer, selected, place) {
  const text = document.createTextNode(answer.text);
  const meta = el("p", { className: "meta" });
  written.set(answer, { text, meta });
  const box = el("article", { className: `answer ${answer.state}` });
  if (turn.answers.length > 1) box.append(el("p", { className: "meta" }, wayOf(answer)));
  box.append(el("p", { className: "text" }, text), meta);
  if (answer.avg) meta.append(detailsButton(turn, answer, selected, place));
  else if (answer.state === "running") meta.append("Looking …");
  if (answer.usage) meta.append(...(turn.answers.length > 1 ? compared(turn, answer) : [firstToken(answer)]));
  if (answer.state === "stopped") meta.append(" Stopped.");
  if (answer.problem) {
    const again = el("button", { type: "button", className: "again" }, "Try again");
    again.dataset.turn = place.turn;
    box.append(el("p", { className: "problem", role: "alert" }, answer.problem), again);
  }
  return box;
}

/** @param {Answer} answer */
function wayOf({ way, avg }) {
  const found = avg?.images.at(-1)?.granularity;
  if (way.granularity !== "auto") return `Granularity ${way.granularity}`;
  return found ? `Auto: granularity ${found}` : "Auto";
}

/** @param {Turn} turn @param {Answer} answer @param {boolean} selected @param {{turn: number, answer: number}} place */
function detailsButton(turn, answer, selected, place) {
  const { visual_tokens: taken, visual_tokens_finest: finest } = answer.avg;
  const label = `${format.count(taken)} of ${format.count(finest)} ${turn.answers.length > 1 ? "" : "visual "}tokens`;
  const button = el("button", { type: "button", className: "details", "aria-pressed": String(selected) }, label);
  Object.assign(button.dataset, place);
  return button;
}

/** @param {Answer} answer */
const firstToken = (answer) => ` first token after ${format.seconds(answer.avg.timings.time_to_first_token)}`;

/** Tokens and seconds as bars, to be compared with the answer beside it. @param {Turn} turn @param {Answer} answer */
function compared(turn, answer) {
  const done = turn.answers.filter((each) => each.usage);
  const most = (/** @type {(answer: Answer) => number} */ of) => of(answer) / Math.max(...done.map(of));
  return [
    bar(
      most((each) => each.avg.visual_tokens),
      "accent",
    ),
    `${format.seconds(secondsAfterSeeing(answer))} after seeing`,
    bar(most(secondsAfterSeeing), "accent"),
  ];
}

let spoken = ""; // what has come and was not announced
let frame = 0;

/**
 * Write what has come of an answer, once a frame.
 * @param {Answer} answer
 * @param {string} piece
 */
export function writePiece(answer, piece) {
  answer.text += piece;
  announce(piece);
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => {
    const place = written.get(answer);
    if (place) place.text.data = answer.text;
    $("transcript").scrollTop = $("transcript").scrollHeight;
  });
}

/**
 * Have a screen reader say what is new, a sentence at a time.
 * @param {string} piece
 * @param {boolean} [whole] whether it ends here
 */
export function announce(piece, whole = false) {
  spoken += piece;
  const end = whole ? spoken.length : Math.max(...[". ", "! ", "? ", "\n"].map((mark) => spoken.lastIndexOf(mark))) + 1;
  const sentence = spoken.slice(0, end).trim();
  spoken = spoken.slice(end);
  if (sentence) $("announcer").append(el("p", {}, sentence));
  while ($("announcer").childElementCount > 20) $("announcer").firstChild.remove();
}
