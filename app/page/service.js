/* The HTTP API as the page uses it: pictures, feedback and searches in, answers or a `Problem` out. Knows no DOM.
 *
 * A picture travels as a raw body, so its file name never leaves this machine. */

const GIVE_UP_MS = 90_000; // the server answers within 60 s; the rest is for the upload

/* Why there is no answer. `retryAfter`: seconds to wait, or null. */
export class Problem extends Error {
  constructor(code, detail = "", status = 0, retryAfter = null) {
    super(detail || code);
    Object.assign(this, {code, detail, status, retryAfter});
  }
}

async function getJson(path) {
  const answer = await fetch(path, {headers: {accept: "application/json"}, cache: "no-store"});
  return {ok: answer.ok, status: answer.status, body: await answer.json()};
}

/* {ready, stages}; `stages` is null when nothing answers. */
export async function readiness() {
  try {
    const {ok, body} = await getJson("readyz");
    return {ready: ok, stages: body.stages ?? {}};
  } catch {
    return {ready: false, stages: null};
  }
}

export async function models() {
  const {ok, body} = await getJson("v1/models");
  return ok ? body : {};
}

export async function samples() {
  const {ok, body} = await getJson("samples");
  return ok && Array.isArray(body) ? body : [];
}

export async function sampleFile(name) {
  const answer = await fetch(`samples/${encodeURIComponent(name)}`);
  if (!answer.ok) throw new Problem("not_found");
  const blob = await answer.blob();
  return new File([blob], name, {type: blob.type});
}

/* Post one picture. Throws `Problem`; when `signal` aborts, its AbortError. */
export async function post(path, file, signal) {
  return ask(path, {method: "POST", body: file, headers: {"content-type": kindOf(file)}}, signal);
}

const kindOf = (file) => (file.type.startsWith("image/") ? file.type : "application/octet-stream");

/* One request, and its answer's JSON (null: it has no body). Throws `Problem`, or the AbortError of `signal`. */
async function ask(path, options, signal = new AbortController().signal) {
  const late = AbortSignal.timeout(GIVE_UP_MS);
  let answer, text;
  try {
    answer = await fetch(path, {
      ...options,
      headers: {accept: "application/json", ...options.headers},
      signal: AbortSignal.any([signal, late]),
    });
    text = await answer.text();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Problem(late.aborted ? "timeout" : "network");
  }
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // a proxy in between may answer in HTML: judged by its status below
  }
  if (answer.ok) {
    if (text && (body === null || typeof body !== "object")) throw new Problem("bad_answer");
    return body;
  }
  const byStatus = {413: "too_large", 415: "unsupported_media_type", 429: "overloaded", 502: "unavailable", 503: "unavailable", 504: "timeout"};
  const code = body?.code ?? byStatus[answer.status] ?? (answer.status >= 500 ? "internal_error" : "bad_request");
  // what whoever runs the service finds the request by
  const named = answer.status >= 500 && body?.request_id ? ` Request ${body.request_id}.` : "";
  throw new Problem(code, String(body?.detail ?? "") + named, answer.status, retryAfter(answer.headers.get("retry-after")));
}

/* ---- what is kept --------------------------------------------------------------------------------------------- */

const SAY_AGAIN = 3;

/* {state, keep, pictures}; a service that keeps nothing, or an older one, is "off". */
export async function store() {
  try {
    const {ok, body} = await getJson("v1/store");
    return ok ? body : {state: "off"};
  } catch {
    return {state: "off"};
  }
}

/* Say something of an answer. Sent again with the same key while the service cannot keep it: it is kept once. */
export async function feedback(event) {
  const key = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const headers = {"content-type": "application/json", "idempotency-key": key};
  for (let tries = 1; ; tries++) {
    try {
      return await ask("v1/feedback", {method: "POST", body: JSON.stringify(event), headers});
    } catch (problem) {
      if (!["unavailable", "overloaded", "rate_limited", "network"].includes(problem.code) || tries >= SAY_AGAIN) throw problem;
      await new Promise((resolve) => setTimeout(resolve, (problem.retryAfter ?? 1) * 1000));
    }
  }
}

export async function keepPicture(sha256, file) {
  const headers = {"content-type": kindOf(file)};
  await ask(`v1/pictures/${encodeURIComponent(sha256)}`, {method: "PUT", body: file, headers});
}

export async function search(query) {
  const body = await ask(`v1/search?${query}`, {});
  if (!Array.isArray(body?.items)) throw new Problem("bad_answer");
  return body;
}

/* Retry-After: seconds, or a date. */
function retryAfter(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(Math.max(Math.ceil(seconds), 1), 120) : null;
}
