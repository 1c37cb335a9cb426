/** The page: what is asked, what comes back, and which part of it is shown. */

import { Problem, chat, request, route } from "./api.js";
import { setStops, setUpControls, ways } from "./controls.js";
import { newAnswer, partsOf, picturesOf, requestOf, restore, store } from "./conversation.js";
import { $, el, format, radios } from "./dom.js";
import { showFigure, tokensInWords, watchPicture } from "./figure.js";
import { showNumbers } from "./numbers.js";
import { watchPictures } from "./pictures.js";
import { announce, showTranscript, writePiece } from "./transcript.js";

/**
 * @typedef {import("./conversation.js").Answer} Answer
 * @typedef {import("./conversation.js").Picture} Picture
 * @typedef {import("./conversation.js").Turn} Turn
 */

const FIRST_LOOK = "Describe the picture."; // a question for looking at a picture before there is another one
const DRAFT = "avg-mlx draft";
const FIELDS = ["picture", "question", "granularity", "budget", ""];

const state = {
  finest: 0, // the model's finest granularity
  turns: /** @type {Turn[]} */ (restore()),
  picture: /** @type {Picture | null} */ (null), // that goes with the next question
  known: /** @type {any} */ (null), // what the server told of it
  answer: /** @type {Answer | null} */ (null), // whose numbers are shown
  which: 0, // of the conversation's pictures
  over: 0, // the granularity that evidence compares with
  running: /** @type {AbortController | null} */ (null),
};
let looking = new AbortController();

/** Show all that has changed. */
function show() {
  showTranscript(state.turns, state.answer, { select, again });
  $("ask").hidden = Boolean(state.running);
  $("stop").hidden = !state.running;
  $("anew").hidden = state.turns.length === 0;
  $("transcript").setAttribute("aria-busy", String(Boolean(state.running)));
  showPicture();
}

/** Show the picture for the next question, or the one of the answer that is selected, with what belongs to it. */
function showPicture() {
  const { answer, picture } = state;
  const pictures = picturesOf(state.turns);
  const shown = picture ?? pictures[state.which];
  $("empty").hidden = Boolean(shown);
  $("figure").hidden = !shown;
  $("remove").hidden = !picture;
  const seen = picture ? null : answer?.seen[state.which];
  const layer = document.querySelector("input[name=layer]:checked")?.getAttribute("value") ?? "tokens";
  const compared = seen?.explanation?.evidence ?? [];
  const evidence = compared.find((/** @type {any} */ each) => each.over === state.over) ?? compared[0];
  $("layers").hidden = !seen;
  $("over-field").hidden = layer !== "evidence" || !evidence;
  $("legend").hidden = layer !== "evidence" || !evidence;
  if (evidence) showComparison(compared, evidence);
  if (!shown) $("numbers").hidden = true;
  if (!shown) return;
  showFigure(shown, seen ?? (picture && state.known), seen ? layer : picture && state.known ? "crops" : "", evidence);
  $("caption").textContent = caption(seen, layer, evidence);
  $("which").hidden = pictures.length < 2 || Boolean(picture);
  radios($("which"), "which", pictures.map((_, n) => [String(n), String(n + 1)]), String(state.which));
  if (answer && !picture) showNumbers(answer, state.which, evidence);
  else $("numbers").hidden = true;
}

/** @param {any[]} compared @param {any} evidence */
function showComparison(compared, evidence) {
  const options = [...compared].sort((a, b) => a.over - b.over).map(({ over }) => el("option", { value: over }, String(over)));
  $("over").replaceChildren(...options);
  $("over").value = evidence.over;
  $("against").textContent = `for ${evidence.over}`;
  $("for").textContent = `for ${evidence.for}`;
}

/** @param {any} seen @param {string} layer @param {any} evidence */
function caption(seen, layer, evidence) {
  if (!seen) return state.picture ? `${state.picture.name}, for your next question` : "";
  if (layer === "tokens") return tokensInWords(seen);
  if (layer === "picture") return `${seen.geometry.image_size[1]} × ${seen.geometry.image_size[0]} pixels`;
  if (!evidence) return "The granularity was chosen without the router, so there is no evidence.";
  return `Where the picture speaks for granularity ${evidence.for}, and where for ${evidence.over}: ${format.signed(evidence.image)} together.`;
}

/** Show a problem beside its field; without one, clear them all. @param {unknown} [error] @param {string} [field] */
function tell(error, field) {
  for (const name of FIELDS) $(name ? `${name}-problem` : "problem").textContent = "";
  if (!error) return;
  const problem = error instanceof Problem ? error : new Problem(`Something went wrong in this page: ${error}`);
  const place = field ?? problem.field;
  $(place ? `${place}-problem` : "problem").textContent = problem.message;
  if (place === "question") $("question").focus();
}

/** Take a picture for the next question, and let the server see it while the question is written. @param {Picture} picture */
async function take(picture) {
  looking.abort();
  looking = new AbortController();
  tell();
  Object.assign(state, { picture, known: null });
  show();
  try {
    const messages = [{ role: "user", content: partsOf(FIRST_LOOK, picture) }];
    const told = await route({ messages, granularity: state.finest || undefined }, looking.signal);
    setStops(told.images[0].visual_tokens_at);
    if (state.picture === picture) Object.assign(state, { known: told.images[0] });
  } catch (error) {
    if (/** @type {Error} */ (error).name === "AbortError") return;
    const refused = error instanceof Problem && [400, 413, 422].includes(error.status);
    if (refused && state.picture === picture) state.picture = null;
    tell(error, "picture");
  }
  show();
}

/** Ask the question that is written. */
async function ask() {
  const question = $("question").value.trim();
  if (state.running) return;
  tell();
  if (!state.picture && !picturesOf(state.turns).length) return tell(new Problem("Choose a picture first."), "picture");
  if (!question) return tell(new Problem("Write a question first."), "question");
  const turn = { question, picture: state.picture, answers: ways().map(newAnswer) };
  const { known } = state;
  state.turns.push(turn);
  Object.assign(state, { picture: null, known: null, running: new AbortController() });
  keepDraft("");
  await run(turn).catch((error) => takeBack(turn, known, error));
  state.running = null;
  store(state.turns);
  show();
}

/** Get a turn's answers, one after the other. Throws what keeps the first one from beginning. @param {Turn} turn */
async function run(turn) {
  const { signal } = /** @type {AbortController} */ (state.running);
  for (const answer of turn.answers) {
    select(turn, answer);
    try {
      await receive(answer, signal);
      answer.state = "done";
    } catch (error) {
      if (!turn.answers[0].avg) throw error;
      const stopped = /** @type {Error} */ (error).name === "AbortError";
      answer.state = stopped ? "stopped" : "failed";
      answer.problem = stopped ? "" : String(/** @type {Error} */ (error).message);
    }
    announce("", true);
    if (signal.aborted) turn.answers = turn.answers.filter((each) => each.avg);
    if (signal.aborted) return;
  }
}

/** @param {Answer} answer @param {AbortSignal} signal */
async function receive(answer, signal) {
  for await (const chunk of chat(requestOf(state.turns, answer.way), signal)) {
    const begins = !answer.avg;
    if (chunk.avg) answer.avg = chunk.avg;
    if (chunk.usage) answer.usage = chunk.usage;
    const piece = chunk.choices[0]?.delta.content;
    if (piece) writePiece(answer, piece);
    if (begins) explain(answer);
    if (begins) show();
  }
}

/** Give back what was typed and chosen for a turn that got no answer. @param {Turn} turn @param {any} known @param {any} error */
function takeBack(turn, known, error) {
  state.turns = state.turns.filter((each) => each !== turn);
  keepDraft([turn.question, $("question").value].filter(Boolean).join("\n"));
  state.picture ??= turn.picture;
  state.known = state.picture === turn.picture ? known : state.known;
  const last = state.turns.at(-1);
  state.answer = last?.answers[0] ?? null;
  if (error.name !== "AbortError") tell(error);
}

/** Ask where an answer looked and why, and show it when it is told. @param {Answer} answer */
async function explain(answer) {
  const end = state.turns.findIndex((turn) => turn.answers.includes(answer)) + 1;
  try {
    const told = await route({ ...requestOf(state.turns.slice(0, end), answer.way), explain: true });
    answer.seen = told.images;
    setStops(told.images.at(-1).visual_tokens_at);
    if (state.answer === answer) showPicture();
  } catch (error) {
    if (state.answer === answer) tell(error, "picture");
  }
}

/** Show the numbers of an answer. @param {Turn} turn @param {Answer} answer */
function select(turn, answer) {
  const before = state.turns.slice(0, state.turns.indexOf(turn) + 1);
  Object.assign(state, { answer, which: picturesOf(before).length - 1, over: 0 });
  if (answer.avg && !answer.seen.length) explain(answer);
  show();
}

/** Ask a turn's question again that was cut off. @param {Turn} turn */
function again(turn) {
  if (state.running) return;
  takeBack(turn, null, { name: "AbortError" });
  ask();
}

/** @param {string} text */
function keepDraft(text) {
  $("question").value = text;
  sessionStorage.setItem(DRAFT, text);
}

function begin() {
  state.turns = [];
  Object.assign(state, { answer: null, picture: null, known: null });
  store([]);
  tell();
  show();
  $("question").focus();
}

/** Ask which model there is, and set the page up for it. */
async function start() {
  keepDraft(sessionStorage.getItem(DRAFT) ?? "");
  watchPictures(take, (problem) => tell(problem, "picture"));
  watchPicture();
  $("composer").addEventListener("submit", (/** @type {Event} */ event) => (event.preventDefault(), ask()));
  $("question").addEventListener("input", () => sessionStorage.setItem(DRAFT, $("question").value));
  $("question").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && state.running?.abort());
  $("stop").addEventListener("click", () => (state.running?.abort(), $("question").focus()));
  $("anew").addEventListener("click", () => (state.running?.abort(), begin()));
  $("remove").addEventListener("click", () => (Object.assign(state, { picture: null, known: null }), tell(), show()));
  $("layers").addEventListener("change", (/** @type {any} */ event) => {
    if (event.target.name === "which") state.which = Number(event.target.value);
    if (event.target.id === "over") state.over = Number(event.target.value);
    showPicture();
  });
  show();
  try {
    const { data } = await (await request("v1/models")).json();
    $("model").textContent = data[0].id;
    state.finest = Math.max(...data[0].avg.granularities);
    setUpControls(data[0].avg);
    const last = state.turns.at(-1);
    if (last) select(last, last.answers[0]);
  } catch (error) {
    tell(error);
  }
}

start();
