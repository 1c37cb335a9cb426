/** The picture with what lies over it: crops and tokens as lines, evidence as colour. The server says where. */

import { $, format, svg } from "./dom.js";

const FOR = [84, 39, 136]; // purple and orange, which colour-blind readers tell apart
const AGAINST = [179, 88, 6];
const STRONGEST = 0.9; // opacity of the strongest evidence
const HATCHES = 90; // across the picture

/**
 * @typedef {{box: number[], row_edges: number[], column_edges: number[], kept_rows: number[], kept_columns: number[]}} Crop
 * @typedef {{image_size: number[], granularity: number, token_grid: number[], crop_grid: number[], crops: Crop[]}} Geometry
 */

/**
 * Show a picture.
 * @param {import("./conversation.js").Picture} picture
 * @param {any} seen what the server told of it, if it did
 * @param {string} layer picture, tokens or evidence
 * @param {any} [evidence] for the granularity over another one
 */
export function showFigure(picture, seen, layer, evidence) {
  if ($("picture").src !== picture.uri) {
    $("unseen").hidden = true;
    $("picture").src = picture.uri;
  }
  $("picture").alt = picture.name;
  $("stage").className = seen ? layer : "";
  $("overlay").replaceChildren();
  $("heat").hidden = layer !== "evidence" || !evidence;
  if (!seen) return natural();
  place(seen.geometry);
  if (layer === "tokens") drawTokens(seen.geometry);
  if (layer === "evidence" && evidence) drawHeat(evidence.heat);
  if (layer === "evidence") drawCrops(seen.geometry, "faint");
}

/** Say so if the browser cannot show a picture, and give it its own shape until the server told where its crops lie. */
export function watchPicture() {
  $("picture").addEventListener("load", () => $("stage").className || natural());
  $("picture").addEventListener("error", () => ($("unseen").hidden = false));
}

function natural() {
  const { naturalWidth, naturalHeight } = $("picture");
  frame([0, 0, 1, 1], [1, 1]);
  if (naturalHeight) shape(naturalWidth / naturalHeight);
}

/** @param {number} ratio width to height */
const shape = (ratio) => $("stage").style.setProperty("--ratio", String(ratio));

/** Make room for the image and for the padding around it that its crops show. @param {Geometry} geometry */
function place({ image_size: [height, width], crops }) {
  const boxes = [[0, 0, height, width], ...crops.map((crop) => crop.box)];
  const [top, left] = [0, 1].map((side) => Math.min(...boxes.map((box) => box[side])));
  const [bottom, right] = [2, 3].map((side) => Math.max(...boxes.map((box) => box[side])));
  frame([top, left, bottom, right], [height, width]);
  shape((right - left) / (bottom - top));
  $("overlay").setAttribute("viewBox", `${left} ${top} ${right - left} ${bottom - top}`);
}

/** @param {number[]} box @param {number[]} size */
function frame([top, left, bottom, right], [height, width]) {
  for (const element of [$("picture"), $("heat")]) {
    element.style.left = `${(-left / (right - left)) * 100}%`;
    element.style.top = `${(-top / (bottom - top)) * 100}%`;
    element.style.width = `${(width / (right - left)) * 100}%`;
    element.style.height = `${(height / (bottom - top)) * 100}%`;
  }
}

/** Crops that cut the image into parts; a small image has one only, of the whole. @param {Geometry} geometry */
const parts = ({ crops }) => (crops.length > 1 ? crops.slice(1) : crops);

/** @param {Geometry} geometry */
function drawTokens(geometry) {
  const size = geometry.image_size[1] / HATCHES;
  const line = svg("path", { d: `M0 0V${size}`, "stroke-width": size });
  const pattern = {
    id: "hatch",
    width: size,
    height: size,
    patternUnits: "userSpaceOnUse",
    patternTransform: "rotate(45)",
  };
  $("overlay").append(svg("defs", {}, svg("pattern", pattern, line)));
  for (const crop of parts(geometry)) {
    for (const [top, left, bottom, right] of cutAway(crop)) {
      $("overlay").append(svg("rect", { class: "cut", x: left, y: top, width: right - left, height: bottom - top }));
    }
    const { row_edges: rows, column_edges: columns } = crop;
    const across = rows.slice(1, -1).map((y) => `M${columns[0]} ${y}H${columns.at(-1)}`);
    const down = columns.slice(1, -1).map((x) => `M${x} ${rows[0]}V${rows.at(-1)}`);
    const d = [...across, ...down].join("");
    $("overlay").append(svg("path", { class: "cells under", d }), svg("path", { class: "cells", d }));
  }
  drawCrops(geometry, "");
}

/** @param {Geometry} geometry @param {string} kind */
function drawCrops(geometry, kind) {
  const boxes = parts(geometry).map(({ box: [top, left, bottom, right] }) => ({
    x: left,
    y: top,
    width: right - left,
    height: bottom - top,
  }));
  for (const shape of ["under", ""]) {
    $("overlay").append(...boxes.map((box) => svg("rect", { class: `crop ${shape} ${kind}`, ...box })));
  }
}

/**
 * What packing cuts away of a crop: boxes above, below, left and right of what it keeps.
 * @param {Crop} crop
 */
function cutAway({ row_edges: y, column_edges: x, kept_rows: [first, last], kept_columns: [start, stop] }) {
  const [bottom, right] = [y[y.length - 1], x[x.length - 1]];
  const boxes = [
    [y[0], x[0], y[first], right],
    [y[last], x[0], bottom, right],
    [y[first], x[0], y[last], x[start]],
    [y[first], x[stop], y[last], right],
  ];
  return boxes.filter((box) => box[0] < box[2] && box[1] < box[3]);
}

/** @param {number[][]} heat */
function drawHeat(heat) {
  const [height, width] = [heat.length, heat[0].length];
  const most = Math.max(...heat.map((row) => Math.max(...row.map(Math.abs)))) || 1;
  const image = new ImageData(width, height);
  heat.flat().forEach((value, n) => {
    const alpha = 255 * STRONGEST * Math.sqrt(Math.abs(value) / most);
    image.data.set([...(value > 0 ? FOR : AGAINST), alpha], 4 * n);
  });
  Object.assign($("heat"), { width, height });
  $("heat").getContext("2d").putImageData(image, 0, 0);
}

/** Where the tokens lie, in words. @param {any} seen */
export function tokensInWords({ geometry }) {
  const [rows, columns] = geometry.token_grid;
  const local = geometry.crops.slice(1);
  if (!local.length) return `The whole picture in ${rows} × ${columns} tokens.`;
  const kept = local.reduce(
    (/** @type {number} */ sum, /** @type {any} */ { kept_rows: r, kept_columns: c }) =>
      sum + (r[1] - r[0]) * (c[1] - c[0]),
    0,
  );
  const cut = local.length * rows * columns - kept;
  const crops = `${local.length} crop${local.length > 1 ? "s" : ""} of ${rows} × ${columns} tokens, and the whole once more in ${rows} × ${columns}.`;
  return cut ? `${crops} Hatched: ${format.count(cut)} tokens that are cut away.` : crops;
}
