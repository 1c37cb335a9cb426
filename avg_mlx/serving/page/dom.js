/** Making and finding elements. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * The element of the page with this id.
 * @param {string} id
 * @returns {any}
 */
export const $ = (id) => document.getElementById(id);

/**
 * A new element. Properties that begin with "aria-", and "role" and "scope", are set as attributes.
 * @param {string} tag
 * @param {Record<string, any>} [properties]
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(aria-|role$|scope$)/.test(name)) element.setAttribute(name, value);
    else Object.assign(element, { [name]: value });
  }
  element.append(...children);
  return element;
}

/**
 * A new element of SVG.
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {...Node} children
 */
export function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/**
 * A bar that fills a share of its width. What it tells stands beside it in words.
 * @param {number} share from 0 to 1
 * @param {string} kind its class
 */
export function bar(share, kind = "") {
  const fill = el("i", { className: kind });
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return el("span", { className: "bar", "aria-hidden": "true" }, fill);
}

/**
 * Radio buttons in a fieldset, in place of others that it may have.
 * @param {HTMLFieldSetElement} fieldset
 * @param {string} name
 * @param {[string, string][]} choices value and label
 * @param {string} chosen
 */
export function radios(fieldset, name, choices, chosen) {
  const there = [...fieldset.querySelectorAll("input")];
  there.forEach((input) => (input.checked = input.value === chosen));
  if (there.map((input) => input.value).join() === choices.map(([value]) => value).join()) return;
  fieldset.querySelectorAll("label").forEach((label) => label.remove());
  for (const [value, label] of choices) {
    const input = el("input", { type: "radio", name, value, checked: value === chosen });
    fieldset.append(el("label", {}, input, el("span", {}, label)));
  }
}

/** Numbers as people read them. */
export const format = {
  /** @param {number} n */
  count: (n) => n.toLocaleString("en"),
  /** @param {number} share */
  percent: (share) => `${(share * 100).toFixed(1)} %`,
  /** @param {number} s */
  seconds: (s) => `${s >= 100 ? s.toFixed(0) : s >= 1 ? s.toFixed(1) : s.toFixed(3)} s`,
  /** @param {number} x */
  signed: (x) => `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}`,
};
