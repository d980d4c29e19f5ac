/* Search over what was analysed: words, verdict, tag and dates in, pictures with their answers out, page by page.
 *
 * Everything that was kept goes in through textContent or attributes, never as markup. Knows no HTTP (service.js). */

import {element} from "./card.js";
import * as service from "./service.js";
import * as words from "./words.js";

const $ = (id) => document.getElementById(id);
const template = document.querySelector("#hit");
let query = new URLSearchParams();
let next = null;
let run = 0; // answers to an older search are not shown
let shown = new Set(); // a picture that was analysed twice is shown once

/* Show the search, if anything is kept. */
export function show() {
  $("gallery").hidden = false;
}

$("gallery").addEventListener("toggle", () => {
  if ($("gallery").open && !run) search();
});

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});

function search() {
  query = new URLSearchParams();
  const put = (name, value) => value && query.set(name, value);
  put("q", $("search-words").value.trim());
  put("verdict", $("search-verdict").value);
  put("tag", $("search-tag").value.trim().toLowerCase());
  put("from", startOfDay($("search-from").value, 0));
  put("to", startOfDay($("search-to").value, 1));
  next = null;
  shown = new Set();
  $("found").replaceChildren();
  page(++run);
}

/* "2026-11-28" -> the moment at which that day, or one some days later, begins where this browser is. */
function startOfDay(date, later) {
  if (!date) return "";
  const [year, month, day] = date.split("-").map(Number);
  return new Date(year, month - 1, day + later).toISOString();
}

async function page(mine) {
  $("found-note").textContent = "Searching…";
  $("found-more").hidden = true;
  const asked = new URLSearchParams(query);
  if (next) asked.set("cursor", next);
  try {
    const answer = await service.search(asked);
    if (mine !== run) return;
    next = answer.next;
    const fresh = answer.items.filter(({annotation}) => !shown.has(annotation.sha256) && shown.add(annotation.sha256));
    $("found").append(...fresh.map(hit));
    $("found-more").hidden = !next;
    $("found-note").textContent = shown.size ? words.plural(shown.size, "picture", "pictures") + (next ? " so far" : "") : "Nothing was found.";
  } catch (error) {
    if (mine !== run) return;
    $("found-note").textContent = words.searchProblem(error.code);
    $("found-more").hidden = !next;
  }
}

$("found-more").addEventListener("click", () => page(run));

function hit({at, annotation, picture}) {
  const root = template.content.firstElementChild.cloneNode(true);
  const find = (name) => root.querySelector(`.${name}`);
  const caption = annotation.caption?.text ?? "";
  const verdict = words.VERDICTS[annotation.detection?.label];
  const image = find("hit-picture");
  if (picture) {
    image.alt = caption || "A picture without a caption";
    image.addEventListener("error", () => withoutPicture());
    image.src = `v1/pictures/${encodeURIComponent(annotation.sha256)}?size=small`;
  } else {
    withoutPicture();
  }
  function withoutPicture() {
    image.hidden = true;
    find("hit-none").hidden = false;
  }
  root.dataset.verdict = annotation.detection?.label ?? "none";
  find("hit-verdict").textContent = verdict ? `${verdict.text}, ${words.percent(annotation.detection.ai_probability)} AI` : "No verdict";
  find("hit-caption").textContent = caption || "No caption";
  find("hit-tags").replaceChildren(
    ...(annotation.tags ?? []).map((tag) => {
      const item = element("li", "");
      const button = element("button", tag, "hit-tag");
      button.type = "button";
      button.title = `Find pictures with the tag ${tag}`;
      button.addEventListener("click", () => {
        $("search-tag").value = tag;
        search();
      });
      item.append(button);
      return item;
    }),
  );
  find("hit-time").dateTime = at;
  find("hit-time").textContent = new Date(at).toLocaleString();
  return root;
}
