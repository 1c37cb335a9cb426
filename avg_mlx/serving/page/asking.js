/** Asking: pictures are looked at, questions are sent, answers come in. */

import { Problem, chat, route } from "./api.js";
import { setStops, ways } from "./controls.js";
import { newAnswer, partsOf, picturesOf, requestOf, store } from "./conversation.js";
import { $ } from "./dom.js";
import { keepDraft, state } from "./state.js";
import { announce, writePiece } from "./transcript.js";
import { show, showPicture, tell } from "./view.js";

/**
 * @typedef {import("./conversation.js").Answer} Answer
 * @typedef {import("./conversation.js").Turn} Turn
 */

const FIRST_LOOK = "Describe the picture."; // stands for the question as long as there is none
const UNUSABLE = [400, 413, 422]; // statuses that say that the picture is at fault

let looking = new AbortController();

/**
 * Take a picture for the next question, and let the server see it meanwhile.
 * @param {import("./conversation.js").Picture} picture
 */
export async function take(picture) {
  looking.abort();
  looking = new AbortController();
  state.picture = picture;
  tell();
  show();
  $("question").focus();
  try {
    const messages = [{ role: "user", content: partsOf(FIRST_LOOK, picture) }];
    const told = await route({ messages, granularity: state.finest || undefined }, looking.signal);
    setStops(told.images[0].visual_tokens_at);
  } catch (/** @type {any} */ error) {
    if (error.name === "AbortError") return;
    if (UNUSABLE.includes(error.status) && state.picture === picture) state.picture = null;
    error.message = error.message.replace(/^The data URI/, picture.name);
    show();
    tell(error, "picture");
  }
}

/** Give the picture back that was taken for the next question. */
export function drop() {
  looking.abort();
  state.picture = null;
  tell();
  show();
}

/** Ask the question that is written. */
export async function ask() {
  const question = $("question").value.trim();
  if (state.running) return;
  tell();
  if (!state.picture && !picturesOf(state.turns).length) return tell(new Problem("Choose a picture first."), "picture");
  if (!question) return tell(new Problem("Write a question first."), "question");
  const turn = { question, picture: state.picture, answers: ways().map(newAnswer) };
  state.turns.push(turn);
  Object.assign(state, { picture: null, running: new AbortController() });
  write("");
  store(state.turns);
  await run(turn).catch((error) => takeBack(turn, error));
  state.running = null;
  store(state.turns);
  show();
}

/** @param {string} question */
function write(question) {
  $("question").value = question;
  keepDraft(question);
}

/** Get a turn's answers, one after the other. Throws what keeps the first one from beginning. @param {Turn} turn */
async function run(turn) {
  const { signal } = /** @type {AbortController} */ (state.running);
  for (const answer of turn.answers) {
    select(turn, answer);
    try {
      await receive(answer, signal);
      answer.state = "done";
    } catch (/** @type {any} */ error) {
      if (!turn.answers[0].avg) throw error;
      answer.state = signal.aborted ? "stopped" : "failed";
      answer.problem = signal.aborted ? "" : error.message;
    }
    announce("", true);
    if (signal.aborted) return keepBegun(turn);
  }
}

/** Leave out the answers of a turn that was stopped before they began. @param {Turn} turn */
function keepBegun(turn) {
  if (!state.turns.includes(turn)) return; // a new conversation has begun
  turn.answers = turn.answers.filter((answer) => answer.avg);
  select(turn, turn.answers[turn.answers.length - 1]);
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

/** Give back what was written and chosen for a turn that got no answer. @param {Turn} turn @param {any} [error] */
function takeBack(turn, error) {
  if (!state.turns.includes(turn)) return;
  state.turns = state.turns.filter((each) => each !== turn);
  write([turn.question, $("question").value].filter(Boolean).join("\n"));
  state.picture ??= turn.picture;
  state.answer = state.turns.at(-1)?.answers[0] ?? null;
  if (error && error.name !== "AbortError") tell(error);
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
export function select(turn, answer) {
  const before = state.turns.slice(0, state.turns.indexOf(turn) + 1);
  Object.assign(state, { answer, which: picturesOf(before).length - 1, over: 0 });
  if (answer.avg && !answer.seen.length) explain(answer);
  show();
}

/** Ask a turn's question again whose answer was cut off. @param {Turn} turn */
export function again(turn) {
  if (state.running) return;
  const draft = { question: $("question").value, picture: state.picture };
  state.turns = state.turns.filter((each) => each !== turn);
  state.picture = turn.picture;
  write(turn.question);
  ask();
  if (draft.picture) state.picture = draft.picture;
  write(draft.question);
  show();
}

/** Forget the conversation. */
export function begin() {
  state.running?.abort();
  Object.assign(state, { turns: [], answer: null });
  store([]);
  drop();
  $("question").focus();
}
