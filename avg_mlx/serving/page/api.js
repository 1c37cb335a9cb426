/** The server, as the page sees it: requests, streams, problems, and the key. */

import { $ } from "./dom.js";

const KEY = "avg-mlx key";
const GONE = "The server does not answer. Is it still running? Nothing is lost; try again when it is.";
const CUT = "The connection ended before the answer did.";

/** What went wrong, in words for people, and where. */
export class Problem extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, param?: string | null, code?: string | null, retry?: string | null}} [more]
   */
  constructor(message, { status = 0, param = null, code = null, retry = null } = {}) {
    super(retry ? `${message} (again in ${retry} s)` : message);
    this.status = status;
    this.param = param ?? "";
    this.code = code ?? "";
  }

  /** Which field of the page it belongs to. */
  get field() {
    if (this.code === "request_too_large" || this.code === "too_many_images" || /image_url/.test(this.param))
      return "picture";
    if (this.param === "granularity") return "granularity";
    if (this.param === "max_visual_tokens") return "budget";
    return this.param.startsWith("messages") ? "question" : "";
  }
}

/**
 * Send a request, and ask for the key if it needs one. Throws Problem, or AbortError where the signal says so.
 * @param {string} path
 * @param {object} [body] of a POST
 * @param {AbortSignal} [signal]
 * @returns {Promise<Response>}
 */
export async function request(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    /** @type {Record<string, string>} */
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const method = body ? "POST" : "GET";
    const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) }).catch(
      (error) => {
        throw error.name === "AbortError" ? error : new Problem(GONE);
      },
    );
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (response.status !== 401) throw problem;
    if (sessionStorage.getItem(KEY) === key && !(await askForKey(key !== null))) throw problem;
  }
}

/** @param {Response} response */
async function problemOf(response) {
  const retry = response.headers.get("Retry-After");
  const { error } = await response.json().catch(() => ({ error: {} }));
  return new Problem(sentence(error?.message ?? `The server answered ${response.status}.`), {
    ...error,
    status: response.status,
    retry,
  });
}

/** @param {string} message */
const sentence = (message) => message[0].toUpperCase() + message.slice(1) + (/[.!?…]$/.test(message) ? "" : ".");

/** @type {Promise<boolean> | undefined} */
let asking;

/**
 * Ask for the key, once for all requests that need it now. False if there is none.
 * @param {boolean} wrong whether one was given that is wrong
 */
function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-problem").textContent = wrong ? "This key is not the server's." : "";
    $("key").value = "";
    let given = false;
    $("key-cancel").onclick = () => dialog.close();
    $("key-form").onsubmit = (/** @type {Event} */ event) => {
      const key = $("key").value.trim();
      given = /^[\x20-\x7e]+$/.test(key); // no header carries anything else
      if (given) sessionStorage.setItem(KEY, key);
      else event.preventDefault();
      $("key-problem").textContent = given ? "" : "This cannot be a key: it has plain letters, digits and signs.";
    };
    dialog.onclose = () => {
      asking = undefined;
      resolve(given);
    };
    dialog.showModal();
  });
  return asking;
}

/**
 * The chunks of a streamed answer. Throws Problem where it fails.
 * @param {object} body
 * @param {AbortSignal} signal
 */
export async function* chat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", asked, signal);
  let rest = "";
  const stream = /** @type {ReadableStream<any>} */ (response.body).pipeThrough(new TextDecoderStream());
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Problem(CUT);
    });
    if (done) throw new Problem(CUT);
    const events = (rest + value).split("\n\n");
    rest = /** @type {string} */ (events.pop());
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Problem(sentence(chunk.error.message), chunk.error);
      yield chunk;
    }
  }
}

/**
 * How closely images are looked at, where, and why.
 * @param {object} body
 * @param {AbortSignal} [signal]
 */
export const route = async (body, signal) => (await request("v1/route", body, signal)).json();
