/* Everything the page says in words: what a verdict, a problem or a trace in the file means, and what to do next.
 * Knows no DOM and no HTTP. */

export const VERDICTS = {
  ai: {text: "Likely AI-made", icon: "#i-ai"},
  human: {text: "Likely human-made", icon: "#i-human"},
  uncertain: {text: "Uncertain", icon: "#i-uncertain"},
};

export const STAGES = {decode: "Decoding", detector: "Detector", captioner: "Captioner", tagger: "Tagger"};

export const modelName = (stage) => (stage === "prompt" ? "Tag prompt" : STAGES[stage] ?? stage);

const READABLE = "Choose a JPEG, PNG, WebP, GIF, TIFF, AVIF or HEIC file.";

/* code of a problem -> what to do next. The server's own `detail` stands below it on the card. */
const PROBLEMS = {
  empty_body: "This file is empty. Choose another one.",
  bad_request: "The service could not read this upload. Reload the page, then add the picture again.",
  bad_base64: "The picture arrived garbled. Reload the page, then add it again.",
  unknown_task: "This page asked for something the service does not know. Reload the page to get its newest version.",
  bad_parameter: "This page asked for something the service does not know. Reload the page to get its newest version.",
  callback_refused: "The service may not send answers to this address. Ask whoever runs it to allow it.",
  not_an_image: `This file is not a picture that DeepTrust can read. ${READABLE}`,
  unsupported_media_type: `DeepTrust does not read this kind of file. ${READABLE}`,
  truncated: "The picture is damaged or incomplete. Download or export it again, then add the new file.",
  too_small: "The picture is too small to judge. Use a larger version of it.",
  too_many_pixels: "The picture has too many pixels. Scale it down, then add it again.",
  too_large: "The file is too large. Save it smaller, then add it again.",
  too_many_pictures: "Too many pictures in one request. Add fewer at a time.",
  method_not_allowed: "The service refused the request. Reload the page to get its newest version.",
  not_found: "The service does not know this address. Reload the page to get its newest version.",
  conflict: "This was said before, and otherwise. Reload the page, then say it again.",
  unauthorized: "This service wants a key. Reload the page and give yours as the password.",
  forbidden: "Your key does not allow this.",
  host_refused: "The service does not answer under this address. Open it at localhost, or ask whoever runs it to allow this one.",
  rate_limited: "Too many requests with your key. Wait a moment, then press Retry.",
  quota_exceeded: "Your key has used up its requests of the day. It begins again at midnight UTC.",
  overloaded: "The service is still too busy after several tries. Wait a minute, then press Retry.",
  timeout: "The analysis took too long. Press Retry; if it happens again, use a smaller version of the picture.",
  unavailable: "The service cannot answer at the moment. Press Retry in a minute.",
  internal_error: "Something went wrong in the service. Press Retry; if it happens again, tell whoever runs it.",
  network: "The service could not be reached. Check the connection, then press Retry.",
  bad_answer: "The answer could not be read. Press Retry; if it happens again, tell whoever runs the service.",
  folder: "Folders cannot be added. Open it and add the pictures that are in it.",
};

const WORTH_RETRYING = new Set(["rate_limited", "overloaded", "timeout", "unavailable", "internal_error", "network", "bad_answer"]);

export const problemText = (code) => PROBLEMS[code] ?? "The service could not analyse this picture. Press Retry, or use another file.";

export const worthRetrying = (code) => WORTH_RETRYING.has(code) || !(code in PROBLEMS);

const LOST = {detector: "No verdict", captioner: "No caption", tagger: "No tags", decode: "Not decoded"};
const REASONS = {
  timeout: "ran out of time",
  overloaded: "was too busy",
  unavailable: "is not running",
  failed: "failed on this picture",
  skipped: "had nothing to work on, because a step before it gave no answer",
};

/* One entry of `errors` as a sentence. */
export function gapText({stage, code, detail}) {
  const who = (STAGES[stage] ?? stage).toLowerCase();
  return `${LOST[stage] ?? "Something is missing"}: the ${who} ${REASONS[code] ?? "gave no answer"}.${detail ? ` (${detail})` : ""}`;
}

/* 0.042 -> "4%". Never "0%" or "100%": the detector is not certain. */
export function percent(p) {
  if (p < 0.01) return "<1%";
  if (p > 0.99) return ">99%";
  return `${Math.round(p * 100)}%`;
}

export const duration = (ms) => (ms >= 10000 ? `${Math.round(ms / 1000)} s` : ms >= 1000 ? `${(ms / 1000).toFixed(1)} s` : ms >= 1 ? `${Math.round(ms)} ms` : "< 1 ms");

export const C2PA = {
  valid: "Content Credentials (C2PA): valid. The signed statement of origin fits this file.",
  invalid: "Content Credentials (C2PA): invalid. They do not fit this file, so do not rely on them.",
  absent: "No Content Credentials (C2PA) in this file. That proves nothing: most services remove them.",
};

export const SEALS = {valid: "#i-seal-valid", invalid: "#i-seal-invalid", absent: "#i-seal"};

export function declaredText(declared) {
  if (declared === true) return "The file itself says that AI made it.";
  if (declared === false) return "The file itself says that a camera took it.";
  return "";
}

const KINDS = {c2pa: "C2PA", iptc: "IPTC", xmp: "XMP", png_text: "PNG text", exif: "EXIF"};

export const signalName = ({kind, name}) => `${KINDS[kind] ?? kind} ${name}`;

export const signalValue = ({value, declares_ai: ai}) => value + (ai === true ? " (says: made by AI)" : ai === false ? " (says: captured)" : "");

export const plural = (n, one, many) => `${n} ${n === 1 ? one : many}`;

const STATUS = {starting: "starting", ready: "ready", failed: "could not start"};

export const stageText = (status) => STATUS[status] ?? String(status);

export const PARTS = {verdict: "The verdict", caption: "The caption", tags: "The tags"};

/* "Dog,  wet grass" -> ["dog", "wet grass"]: tags as the service takes them. */
export const tagList = (text) => [...new Set(text.toLowerCase().split(",").map((tag) => tag.trim().slice(0, 32).trim()).filter(Boolean))].slice(0, 32);

const SAID = {
  not_found: "This answer is not kept any more. Analyse the picture again, then say it.",
  bad_parameter: "This cannot be kept: use shorter text without special characters.",
  conflict: "This was said before, and otherwise. Say it again.",
  forbidden: "Your key does not allow to say this. Ask whoever runs the service for one with the scope feedback.",
  quota_exceeded: PROBLEMS.quota_exceeded,
};

export const feedbackProblem = (code) => SAID[code] ?? "This could not be kept at the moment. Try again in a minute.";

const SEARCHED = {
  bad_parameter: "The service cannot search for this: tags have at most 32 characters, words 200.",
  not_found: "Nothing is kept here.",
};

export const searchProblem = (code) => SEARCHED[code] ?? "The search failed. Try again in a minute.";
