/* The page: takes pictures in, sends a few at a time, and keeps trying while the service starts or is busy.
 *
 * In: files (picked, dropped, pasted, samples). Out: one card each. What a card looks like is card.js, what is said is
 * words.js, how the service is asked is service.js. */

import {Card, element} from "./card.js";
import * as feedback from "./feedback.js";
import * as gallery from "./gallery.js";
import * as service from "./service.js";
import * as words from "./words.js";

const AT_ONCE = 3; // requests in flight
const TRIES = 8; // for one picture, while the service is busy or away
const POLL_MS = 1500;
const BUSY = new Set(["overloaded", "rate_limited"]); // waiting helps

const $ = (id) => document.getElementById(id);
const jobs = new Map(); // Card -> {tries, abort: AbortController}
const queue = []; // cards waiting for their turn, first come, first served

let ready = false;
let asking = null; // the readiness poll under way
let inFlight = 0;
let pausedUntil = 0; // ms since the epoch: the service said when to come back
let pauseTimer = 0;
let thresholds = null;
let keeps = false; // answers are kept: they can be judged and found

/* ---- pictures in ---------------------------------------------------------------------------------------------- */

function add(files, credit = "") {
  for (const file of files) {
    const card = new Card(file, credit, {retry, remove, heat});
    jobs.set(card, {tries: 0, abort: new AbortController()});
    $("cards").append(card.root);
    enqueue(card);
  }
  if (files.length) announce(`${words.plural(files.length, "picture", "pictures")} added`);
  refresh();
}

$("picker").addEventListener("change", (event) => {
  add([...event.target.files]);
  event.target.value = ""; // the same file may be chosen again
});

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length) return;
  event.preventDefault();
  add(files);
});

let depth = 0; // drag events come for every element that the pointer crosses
const dragsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragenter", (event) => dragsFiles(event) && mark(++depth));
document.addEventListener("dragleave", (event) => dragsFiles(event) && mark(--depth));
document.addEventListener("dragover", (event) => dragsFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  mark((depth = 0));
  if (!dragsFiles(event)) return;
  event.preventDefault();
  const items = [...event.dataTransfer.items].filter((item) => item.kind === "file");
  const pictures = items.filter((item) => !item.webkitGetAsEntry()?.isDirectory);
  const folders = items.length - pictures.length;
  add(pictures.map((item) => item.getAsFile()).filter(Boolean));
  $("hint").textContent = folders ? words.problemText("folder") : "";
});

function mark(inside) {
  document.body.classList.toggle("dragging", inside > 0);
}

$("drop").addEventListener("click", (event) => {
  if (!event.target.closest("label, input")) $("picker").click();
});

async function showSamples() {
  const list = await service.samples().catch(() => []);
  $("samples").hidden = list.length === 0;
  const credit = ({credit, licence, kind}) => `${kind === "rendering" ? "Computer rendering" : "Photo"}: ${credit}, ${licence}`;
  const run = async (sample) => {
    try {
      add([await service.sampleFile(sample.name)], credit(sample));
    } catch {
      announce(`The sample ${sample.name} could not be loaded.`);
    }
  };
  $("sample-list").replaceChildren(
    ...list.map((sample) => {
      const [item, button, image] = [element("li", ""), element("button", ""), element("img", "")];
      button.type = "button";
      button.title = credit(sample);
      image.alt = `Analyse the sample: ${sample.title ?? sample.name}`;
      image.src = `samples/${encodeURIComponent(sample.name)}`;
      button.append(image);
      button.addEventListener("click", () => run(sample));
      item.append(button);
      return item;
    }),
  );
  $("all-samples").addEventListener("click", async () => {
    for (const sample of list) await run(sample);
  });
}

/* ---- the queue ------------------------------------------------------------------------------------------------ */

function enqueue(card) {
  if (!jobs.has(card)) return;
  queue.push(card);
  pump();
}

function pump() {
  const wait = pausedUntil - Date.now();
  while (ready && wait <= 0 && inFlight < AT_ONCE && queue.length) run(queue.shift());
  clearTimeout(pauseTimer);
  if (queue.length && wait > 0) pauseTimer = setTimeout(pump, Math.min(wait, 1000));
  const text = !ready
    ? "Waiting for the service to be ready…"
    : wait > 0
      ? `The service is busy. Trying again in ${Math.ceil(wait / 1000)} s…`
      : "Waiting for its turn…";
  queue.forEach((card) => card.waiting(text));
  refresh();
}

async function run(card) {
  const job = jobs.get(card);
  job.tries += 1;
  inFlight += 1;
  card.analysing();
  try {
    const answer = await service.post("v1/analyze", card.file, job.abort.signal);
    if (!jobs.has(card)) return;
    announce(card.done(answer, thresholds));
    if (keeps) feedback.offer(card);
  } catch (error) {
    if (jobs.has(card)) await recover(card, job, error instanceof service.Problem ? error : new service.Problem("bad_answer"));
  } finally {
    inFlight -= 1;
    pump();
  }
}

/* Wait and try again where that can help; else say what is wrong. */
async function recover(card, job, problem) {
  const comeBack = BUSY.has(problem.code) || (problem.code === "unavailable" && problem.retryAfter !== null);
  if (comeBack && job.tries < TRIES) {
    pausedUntil = Math.max(pausedUntil, Date.now() + (problem.retryAfter ?? 2) * 1000);
    return enqueue(card);
  }
  if (problem.code === "network" || problem.code === "unavailable") {
    const state = await service.readiness();
    if (!jobs.has(card)) return;
    if (!state.ready && job.tries < TRIES) {
      ready = false;
      showReadiness(state);
      watch();
      return enqueue(card);
    }
  }
  card.failed(problem);
  announce(`${card.name}: ${words.problemText(problem.code)}`);
}

function retry(card) {
  const job = jobs.get(card);
  job.tries = 0;
  card.part("remove").focus(); // the pressed button goes away; the focus stays with its card
  enqueue(card);
}

function remove(card) {
  const next = card.root.nextElementSibling ?? card.root.previousElementSibling;
  forget(card);
  (next?.querySelector(".remove") ?? $("picker")).focus();
  pump();
}

/* A picture that is not wanted any more: what is under way for it is cancelled. */
function forget(card) {
  jobs.get(card).abort.abort();
  jobs.delete(card);
  if (queue.includes(card)) queue.splice(queue.indexOf(card), 1);
  card.remove();
}

$("clear").addEventListener("click", () => {
  [...jobs.keys()].forEach(forget);
  $("picker").focus();
  announce("All pictures removed");
  refresh();
});

/* ---- the heat map --------------------------------------------------------------------------------------------- */

async function heat(card) {
  if (card.heatShown) return card.hideHeat();
  if (card.heatOf === card.answer) return card.showHeat();
  if (card.part("heat-button").getAttribute("aria-busy") === "true") return;
  card.heatNote("Computing the heat map…", true);
  const answer = card.answer;
  for (let tries = 1; jobs.has(card); tries++) {
    try {
      const {detection} = await service.post("v1/detect?explain=png", card.file, jobs.get(card).abort.signal);
      if (!detection?.heat_map?.png) throw new service.Problem("bad_answer");
      card.heatOf = answer;
      card.showHeat(detection.heat_map.png);
      return card.heatNote("");
    } catch (error) {
      if (!jobs.has(card)) return;
      if (!BUSY.has(error.code) || tries >= TRIES) return card.heatNote(`No heat map. ${words.problemText(error.code ?? "bad_answer")}`);
      card.heatNote("The service is busy. Trying again by itself…", true);
      await new Promise((resolve) => setTimeout(resolve, (error.retryAfter ?? 2) * 1000));
    }
  }
}

/* ---- the service's state -------------------------------------------------------------------------------------- */

/* Ask until the service is ready, then let the queue go. */
function watch() {
  asking ??= (async () => {
    for (;;) {
      const state = await service.readiness();
      showReadiness(state);
      if (state.ready) break;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    thresholds = (await service.models().catch(() => ({}))).detector?.thresholds ?? null;
    keeps = (await service.store()).state !== "off";
    if (keeps) gallery.show();
    asking = null;
    ready = true;
    pump();
  })();
}

let lastTitle = "";

function showReadiness({ready: up, stages}) {
  const failed = Object.values(stages ?? {}).some(({status}) => status === "failed");
  const title = up ? "Ready" : stages === null ? "The service does not answer" : failed ? "A model could not start" : "DeepTrust is starting";
  if (title !== lastTitle && !(up && !lastTitle)) announce(title);
  lastTitle = title;
  $("banner").hidden = up;
  $("service").hidden = false;
  $("service").dataset.state = up ? "ready" : "waiting";
  $("service-text").textContent = up ? "Ready" : stages === null ? "No connection" : failed ? "Not ready" : "Starting";
  if (up) return;
  $("banner-title").textContent = title;
  $("banner-text").textContent = failed
    ? "Whoever runs DeepTrust has to look at the message below. This page goes on by itself once it works."
    : stages === null
      ? "Trying to reach it again by itself. Pictures that you add wait here."
      : "You can add pictures now. They are analysed as soon as every model is ready.";
  $("stages").replaceChildren(
    ...Object.entries(stages ?? {}).map(([stage, {status, message}]) => {
      const item = element("li", "");
      item.dataset.status = status;
      item.append(element("span", "", "dot"), element("strong", words.STAGES[stage] ?? stage), element("span", words.stageText(status)));
      if (message && status !== "ready") item.append(element("span", message, "quiet"));
      return item;
    }),
  );
}

/* ---- around the cards ----------------------------------------------------------------------------------------- */

function refresh() {
  const states = [...jobs.keys()].map((card) => card.state);
  const count = (...names) => states.filter((state) => names.includes(state)).length;
  $("results").hidden = states.length === 0;
  document.body.classList.toggle("has-cards", states.length > 0);
  const parts = [
    [count("done"), "analysed"],
    [count("analysing"), "in work"],
    [count("waiting"), "waiting"],
    [count("failed"), "not analysed"],
  ];
  $("summary").textContent = parts.filter(([n]) => n).map(([n, what]) => `${n} ${what}`).join(", ");
}

/* Say something to a screen reader; the last few stay, so that answers that come together are all read. */
function announce(text) {
  $("live").append(element("p", text));
  while ($("live").childElementCount > 5) $("live").firstElementChild.remove();
}

showSamples();
watch();
