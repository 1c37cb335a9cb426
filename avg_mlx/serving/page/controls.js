/** How closely to look: the granularity, the budget, and whether two are compared. Kept in this tab. */

import { $, format, radios } from "./dom.js";

const STORED = "avg-mlx controls";

/** @type {number[]} visual tokens that the picture takes, at one granularity after the other */
let stops = [];

/**
 * Show the model's granularities, and what was chosen before in this tab.
 * @param {{granularities: number[], router: boolean}} model
 */
export function setUpControls({ granularities, router }) {
  const kept = JSON.parse(sessionStorage.getItem(STORED) ?? "{}");
  const finest = String(Math.max(...granularities));
  /** @type {[string, string][]} */
  const choices = [
    ["auto", router ? "Auto" : "Finest"],
    ...granularities.map((g) => /** @type {[string, string]} */ ([`${g}`, `${g}`])),
  ];
  const known = (/** @type {string} */ value) => choices.some(([choice]) => choice === value);
  radios($("left"), "left", choices, known(kept.left) ? kept.left : "auto");
  radios($("right"), "right", choices, known(kept.right) ? kept.right : finest);
  $("compare").checked = Boolean(kept.compare);
  for (const id of ["left", "right", "compare", "budget"]) $(id).addEventListener("input", update);
  update();
}

/**
 * Give the budget a stop for each number of visual tokens that a picture can take. The last one is no limit.
 * @param {Record<string, number>} visualTokensAt
 */
export function setStops(visualTokensAt) {
  const before = budget();
  stops = [...new Set(Object.values(visualTokensAt))].sort((a, b) => a - b);
  const index = before === null ? -1 : stops.findLastIndex((stop) => stop <= before);
  $("budget").max = stops.length - 1;
  $("budget").value = index < 0 ? stops.length - 1 : index;
  update();
}

/** The most visual tokens for each picture, or null for no limit. */
function budget() {
  const index = Number($("budget").value);
  return index < stops.length - 1 ? stops[index] : null;
}

/** The ways to look that are asked for: one, or two to compare. @returns {import("./conversation.js").Way[]} */
export function ways() {
  const sides = $("compare").checked ? ["left", "right"] : ["left"];
  return sides.map((side) => ({ granularity: chosen(side), budget: budget() }));
}

/** @param {string} side */
const chosen = (side) => $("composer").elements[side]?.value ?? "auto";

function update() {
  const compare = $("compare").checked;
  const text = budget() === null ? "no limit" : `${format.count(/** @type {number} */ (budget()))} visual tokens`;
  $("right").hidden = !compare;
  $("budget").disabled = stops.length < 2 || !ways().some((way) => way.granularity === "auto");
  $("budget").setAttribute("aria-valuetext", text);
  $("budget-text").textContent = text;
  sessionStorage.setItem(STORED, JSON.stringify({ left: chosen("left"), right: chosen("right"), compare }));
}
