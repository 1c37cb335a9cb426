/** Questions and answers as they are read: on the page, and by screen readers. */

import { $, el, format } from "./dom.js";
import { secondsAfterSeeing } from "./numbers.js";

/**
 * @typedef {import("./conversation.js").Answer} Answer
 * @typedef {import("./conversation.js").Turn} Turn
 * @typedef {{select: (turn: Turn, answer: Answer) => void, again: (turn: Turn) => void}} Actions
 */

/** @type {WeakMap<Answer, {text: Text, meta: HTMLElement}>} where each answer is written */
const written = new WeakMap();

/**
 * Write all turns anew.
 * @param {Turn[]} turns
 * @param {Answer | null} selected whose numbers are shown
 * @param {Actions} actions
 */
export function showTranscript(turns, selected, actions) {
  const buttons = () => [...$("transcript").querySelectorAll("button")];
  const focused = buttons().findIndex((button) => button === document.activeElement);
  $("transcript").hidden = turns.length === 0;
  $("transcript").replaceChildren(...turns.map((turn) => turnItem(turn, selected, actions)));
  buttons()[focused]?.focus();
}

/** @param {Turn} turn @param {Answer | null} selected @param {Actions} actions */
function turnItem(turn, selected, actions) {
  const asked = el("p", { className: "asked" }, turn.question);
  if (turn.picture) asked.prepend(el("img", { src: turn.picture.uri, alt: turn.picture.name }));
  const answers = turn.answers.map((answer) => answerBox(turn, answer, answer === selected, actions));
  return el("li", {}, asked, el("div", { className: answers.length > 1 ? "answers two" : "answers" }, ...answers));
}

/** @param {Turn} turn @param {Answer} answer @param {boolean} selected @param {Actions} actions */
function answerBox(turn, answer, selected, actions) {
  const text = document.createTextNode(answer.text);
  const meta = el("p", { className: "meta" });
  written.set(answer, { text, meta });
  const box = el("article", { className: `answer ${answer.state}`, "aria-label": labelOf(turn, answer) });
  box.append(el("p", { className: "text" }, text), meta);
  if (answer.avg) meta.append(detailsButton(turn, answer, selected, actions), ` ${secondsOf(turn, answer)}`);
  else if (answer.state === "running") meta.append("Looking …");
  if (answer.state === "stopped") meta.append(" Stopped.");
  if (answer.problem) {
    const again = el("button", { type: "button", className: "again" }, "Try again");
    again.addEventListener("click", () => actions.again(turn));
    box.append(el("p", { className: "problem", role: "alert" }, answer.problem), again);
  }
  return box;
}

/** @param {Turn} turn @param {Answer} answer */
function labelOf(turn, answer) {
  return turn.answers.length > 1 ? `Answer at granularity ${answer.way.granularity}` : "Answer";
}

/** @param {Turn} turn @param {Answer} answer @param {boolean} selected @param {Actions} actions */
function detailsButton(turn, answer, selected, actions) {
  const { visual_tokens: taken, visual_tokens_finest: finest, images } = answer.avg;
  const at = turn.answers.length > 1 ? `At ${images.at(-1)?.granularity}: ` : "";
  const label = `${at}${format.count(taken)} of ${format.count(finest)} visual tokens`;
  const button = el("button", { type: "button", className: "details", "aria-pressed": String(selected) }, label);
  button.addEventListener("click", () => actions.select(turn, answer));
  return button;
}

/** @param {Turn} turn @param {Answer} answer */
function secondsOf(turn, answer) {
  if (!answer.usage) return "";
  if (turn.answers.length > 1) return `${format.seconds(secondsAfterSeeing(answer))} after seeing`;
  return `first token after ${format.seconds(answer.avg.timings.time_to_first_token)}`;
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
