/** The page begins: its controls are set up for the model that is served, and its events lead to what they ask for. */

import { request } from "./api.js";
import { again, ask, begin, drop, select, take } from "./asking.js";
import { setUpControls } from "./controls.js";
import { $ } from "./dom.js";
import { watchPicture } from "./figure.js";
import { watchPictures } from "./pictures.js";
import { draft, keepDraft, state } from "./state.js";
import { show, showPicture, tell } from "./view.js";

/** Events of what is written, and of the buttons. */
function watchComposer() {
  const stop = () => state.running?.abort();
  $("composer").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    ask();
  });
  $("question").addEventListener("input", () => keepDraft($("question").value));
  $("question").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  $("stop").addEventListener("click", () => {
    stop();
    $("question").focus();
  });
  $("anew").addEventListener("click", begin);
  $("remove").addEventListener("click", drop);
}

/** Events of what is shown. */
function watchShown() {
  $("transcript").addEventListener("click", (/** @type {any} */ event) => {
    const { turn, answer } = event.target.closest("button")?.dataset ?? {};
    if (turn === undefined) return;
    const asked = state.turns[turn];
    if (answer === undefined) again(asked);
    else select(asked, asked.answers[answer]);
  });
  $("look").addEventListener("change", (/** @type {any} */ { target }) => {
    if (target.name === "which") state.which = Number(target.value);
    if (target.id === "over") state.over = Number(target.value);
    if (target.type !== "file") showPicture();
  });
}

/** Ask which model there is, and go on with the conversation of this tab if there is one. */
async function start() {
  $("question").value = draft();
  watchPictures(take, (problem) => tell(problem, "picture"));
  watchPicture();
  watchComposer();
  watchShown();
  show();
  try {
    const { data } = await (await request("v1/models")).json();
    const [{ id, avg }] = data;
    $("model").textContent = id;
    state.finest = Math.max(...avg.granularities);
    setUpControls(avg);
    const last = state.turns.at(-1);
    if (last) select(last, last.answers[0]);
  } catch (error) {
    tell(error);
  }
}

start();
