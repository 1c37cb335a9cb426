/** Showing what has changed: the conversation, the picture with what lies over it, the numbers, problems. */

import { Problem } from "./api.js";
import { picturesOf } from "./conversation.js";
import { $, el, format, radios } from "./dom.js";
import { showFigure, tokensInWords } from "./figure.js";
import { showNumbers } from "./numbers.js";
import { state } from "./state.js";
import { showTranscript } from "./transcript.js";

const FIELDS = ["picture", "question", "granularity", "budget", ""];

/** Show everything anew. */
export function show() {
  showTranscript(state.turns, state.answer, Boolean(state.running));
  $("transcript").setAttribute("aria-busy", String(Boolean(state.running)));
  $("ask").hidden = Boolean(state.running);
  $("stop").hidden = !state.running;
  $("anew").hidden = state.turns.length === 0;
  showPicture();
}

/** Show the picture for the next question, or one of the answer that is selected, with what the server told of it. */
export function showPicture() {
  const { answer, picture, which } = state;
  const pictures = picturesOf(state.turns);
  const shown = picture ?? pictures[which];
  const seen = picture ? null : answer?.seen[which];
  const layer = $("layers").querySelector(":checked").value;
  const compared = seen?.explanation?.evidence ?? [];
  const evidence = compared.find((/** @type {any} */ each) => each.over === state.over) ?? compared[0];
  $("empty").hidden = Boolean(shown);
  $("figure").hidden = !shown;
  $("remove").hidden = !picture;
  $("layers").hidden = !seen;
  $("over-field").hidden = $("legend").hidden = layer !== "evidence" || !evidence;
  $("which").hidden = pictures.length < 2 || Boolean(picture);
  radios(
    $("which"),
    "which",
    pictures.map((_, n) => [String(n), String(n + 1)]),
    String(which),
  );
  if (evidence) showComparison(compared, evidence);
  if (shown) showFigure(shown, seen, layer, evidence);
  $("caption").textContent = seen ? caption(seen, layer, evidence) : `${picture?.name}, for your next question`;
  $("caption").hidden = !seen && !picture;
  showNumbers(picture ? null : answer, which, evidence);
}

/** @param {any[]} compared @param {any} evidence */
function showComparison(compared, evidence) {
  const others = compared.map(({ over }) => over).sort((a, b) => a - b);
  $("over").replaceChildren(...others.map((over) => el("option", { value: over }, String(over))));
  $("over").value = evidence.over;
  $("against").textContent = `for ${evidence.over}`;
  $("for").textContent = `for ${evidence.for}`;
}

/** @param {any} seen @param {string} layer @param {any} evidence */
function caption(seen, layer, evidence) {
  const [height, width] = seen.geometry.image_size;
  if (layer === "tokens") return tokensInWords(seen);
  if (layer === "picture") return `${format.count(width)} × ${format.count(height)} pixels.`;
  if (!evidence) return "The router was not asked, so there is no evidence.";
  return `Where the picture speaks for granularity ${evidence.for}, and where for ${evidence.over}: ${format.signed(evidence.image)} in all.`;
}

/**
 * Show a problem beside its field, in place of all others; without one, clear them.
 * @param {any} [error]
 * @param {string} [field]
 */
export function tell(error, field) {
  for (const name of FIELDS) placeOf(name).textContent = "";
  if (!error) return;
  const problem = error instanceof Problem ? error : new Problem(`Something went wrong in this page: ${error}`);
  placeOf(field ?? problem.field).textContent = problem.message;
  if ((field ?? problem.field) === "question") $("question").focus();
}

/** @param {string} field */
const placeOf = (field) => $(field ? `${field}-problem` : "problem");
