/** A conversation: what was asked and answered, and how it is sent, since the server keeps nothing. */

/**
 * @typedef {{name: string, uri: string}} Picture
 * @typedef {{granularity: string, budget: number | null}} Way how closely to look
 * @typedef {object} Answer
 * @property {Way} way
 * @property {string} text
 * @property {any} avg what the server tells beside it, as far as it is known
 * @property {any} usage
 * @property {any[]} seen for each picture: geometry, counts, explanation; empty until the server told
 * @property {"running" | "done" | "stopped" | "failed"} state
 * @property {string} problem
 *
 * @typedef {{question: string, picture: Picture | null, answers: Answer[]}} Turn
 */

const STORED = "avg-mlx conversation";

/**
 * @param {Way} way
 * @returns {Answer}
 */
export const newAnswer = (way) => ({ way, text: "", avg: null, usage: null, seen: [], state: "running", problem: "" });

/**
 * The request that asks the last turn's question, which goes on from the first answer of each turn before it.
 * @param {Turn[]} turns
 * @param {Way} way
 */
export function requestOf(turns, way) {
  const messages = turns.flatMap((turn, n) => {
    const asked = { role: "user", content: partsOf(turn.question, turn.picture) };
    const answered = { role: "assistant", content: turn.answers[0]?.text.trim() || "…" };
    return n < turns.length - 1 ? [asked, answered] : [asked];
  });
  return { messages, ...lookingOf(way) };
}

/**
 * @param {string} question
 * @param {Picture | null} picture
 */
export function partsOf(question, picture) {
  const text = { type: "text", text: question };
  return picture ? [{ type: "image_url", image_url: { url: picture.uri } }, text] : [text];
}

/** @param {Way} way */
function lookingOf({ granularity, budget }) {
  if (granularity !== "auto") return { granularity: Number(granularity) };
  return { granularity, max_visual_tokens: budget };
}

/** All pictures of a conversation, in the order in which they came. @param {Turn[]} turns */
export const picturesOf = (turns) => /** @type {Picture[]} */ (turns.map((turn) => turn.picture).filter(Boolean));

/** Keep the conversation in this tab, for when the page is loaded again. @param {Turn[]} turns */
export function store(turns) {
  const kept = turns.map((turn) => ({ ...turn, answers: turn.answers.map((answer) => ({ ...answer, seen: [] })) }));
  try {
    sessionStorage.setItem(STORED, JSON.stringify(kept));
  } catch {
    sessionStorage.removeItem(STORED); // the pictures are larger than what a tab may keep
  }
}

/** The conversation of this tab. What was running when the page was left has been cut off. @returns {Turn[]} */
export function restore() {
  const turns = /** @type {Turn[]} */ (JSON.parse(sessionStorage.getItem(STORED) ?? "[]"));
  for (const answer of turns.flatMap((turn) => turn.answers).filter((each) => each.state === "running")) {
    Object.assign(answer, { state: "failed", problem: "The page was left before the answer came." });
  }
  return turns;
}
