/** What the page knows. The modules that change it call `show` of view.js afterwards. */

import { restore } from "./conversation.js";

/**
 * @typedef {import("./conversation.js").Answer} Answer
 * @typedef {import("./conversation.js").Picture} Picture
 * @typedef {import("./conversation.js").Turn} Turn
 */

export const state = {
  finest: 0, // the model's finest granularity
  turns: /** @type {Turn[]} */ (restore()),
  picture: /** @type {Picture | null} */ (null), // that goes with the next question
  answer: /** @type {Answer | null} */ (null), // whose numbers are shown
  which: 0, // of the conversation's pictures
  over: 0, // the granularity that evidence compares with
  running: /** @type {AbortController | null} */ (null),
};

const DRAFT = "avg-mlx draft";

/** The question that was being written in this tab. */
export const draft = () => sessionStorage.getItem(DRAFT) ?? "";

/** @param {string} text */
export const keepDraft = (text) => sessionStorage.setItem(DRAFT, text);
