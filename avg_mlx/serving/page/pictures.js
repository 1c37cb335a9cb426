/** Getting pictures: chosen, dropped, pasted, photographed, or the example. */

import { Problem } from "./api.js";
import { $ } from "./dom.js";

const MOST = 64 * 2 ** 20; // bytes that are read at all; the server's own limit is lower

/**
 * Call `take` with each picture that is given in any way, and `fail` with what is none.
 * @param {(picture: import("./conversation.js").Picture) => void} take
 * @param {(problem: Problem) => void} fail
 */
export function watchPictures(take, fail) {
  /** @param {Blob & {name?: string} | undefined} file */
  const read = (file) => file && readPicture(file).then(take, fail);
  for (const [button, input] of [
    ["choose", "file"],
    ["another", "file"],
    ["photograph", "camera"],
  ]) {
    $(button).addEventListener("click", () => $(input).click());
  }
  for (const input of [$("file"), $("camera")]) {
    input.addEventListener("change", () => {
      read(input.files[0]);
      input.value = ""; // so that the same file can be chosen again
    });
  }
  $("example").addEventListener("click", async () => {
    const response = await fetch("page/example.png").catch(() => null);
    if (!response?.ok) fail(new Problem("The example cannot be loaded. Is the server still running?"));
    else read(Object.assign(await response.blob(), { name: "example.png" }));
  });
  watchDrops(read);
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])][0];
    if (file) event.preventDefault();
    read(file);
  });
}

/** @param {(file: File | undefined) => void} read */
function watchDrops(read) {
  let inside = 0; // elements that the dragged thing has entered and not left
  const mark = (/** @type {number} */ change) => {
    inside = Math.max(0, inside + change);
    document.body.classList.toggle("dropping", inside > 0);
  };
  document.addEventListener("dragenter", () => mark(1));
  document.addEventListener("dragleave", () => mark(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(-inside);
    read(event.dataTransfer?.files[0]);
  });
}

/**
 * @param {Blob & {name?: string}} file
 * @returns {Promise<import("./conversation.js").Picture>}
 */
async function readPicture(file) {
  const name = file.name || "the picture";
  if (!file.type.startsWith("image/") && !/\.(heic|heif|avif|tiff?|webp)$/i.test(name)) {
    throw new Problem(`${name} is not a picture. Choose a photo, a drawing or a screenshot.`);
  }
  if (file.size > MOST) throw new Problem(`${name} is larger than ${MOST / 2 ** 20} MB. Make it smaller.`);
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name, uri: String(reader.result) });
    reader.onerror = () => reject(new Problem(`${name} cannot be read. Choose it again.`));
    reader.readAsDataURL(file);
  });
}
