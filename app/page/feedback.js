/* What a person says of one part of an answer: right, or wrong and what would be right.
 *
 * `offer` puts a thumb up and a thumb down under verdict, caption and tags of a card. Pressing one is kept at once;
 * after "wrong" it asks what would be right, which may be left open. When the service asks for the picture, so that a
 * reviewer can see it, it is sent, and the card says so. Knows no card beyond its parts, and no HTTP (service.js). */

import * as service from "./service.js";
import * as words from "./words.js";

const template = document.querySelector("#judge");
const PARTS = {verdict: ".verdict", caption: ".caption", tags: ".tags"};

/* Show what can be said of a card's answer; what was said of an answer before is gone. */
export function offer(card) {
  card.root.querySelectorAll(".judge").forEach((node) => node.remove());
  const answer = card.answer;
  const given = {verdict: answer.detection, caption: answer.caption?.text, tags: answer.tags};
  for (const [part, place] of Object.entries(PARTS)) {
    if (given[part]) card.root.querySelector(place).after(judge(card, part));
  }
}

function judge(card, part) {
  const root = template.content.firstElementChild.cloneNode(true);
  const find = (name) => root.querySelector(`.${name}`);
  const [up, down, form, said] = [find("up"), find("down"), find("correction"), find("said")];
  const field = find("better");
  const choices = find("choices");
  up.querySelector(".sr").textContent = `${words.PARTS[part]} of ${card.name} is right`;
  down.querySelector(".sr").textContent = `${words.PARTS[part]} of ${card.name} is wrong`;
  root.dataset.part = part;
  choices.hidden = part !== "verdict";
  find("text").hidden = part === "verdict";
  find("better-label").textContent = part === "tags" ? "The right tags, with commas between them" : "A better caption";
  field.maxLength = part === "tags" ? 400 : 512;

  async function say(right, value) {
    const {id, sha256} = card.answer;
    said.textContent = "Sending…";
    root.setAttribute("aria-busy", "true");
    try {
      const receipt = await service.feedback({id, sha256, part, right, ...(value === undefined ? {} : {value})});
      up.setAttribute("aria-pressed", String(right));
      down.setAttribute("aria-pressed", String(!right));
      form.hidden = right || value !== undefined;
      said.textContent = "Thank you, this is kept.";
      if (receipt.picture === "wanted") {
        await service.keepPicture(sha256, card.file);
        said.textContent = "Thank you. This and the picture are kept, for a reviewer to see.";
      }
    } catch (error) {
      said.textContent = words.feedbackProblem(error.code);
    } finally {
      root.removeAttribute("aria-busy");
    }
  }

  up.addEventListener("click", () => say(true));
  down.addEventListener("click", async () => {
    await say(false);
    if (form.hidden) return;
    if (part !== "verdict") field.value = part === "tags" ? card.answer.tags.join(", ") : card.answer.caption.text;
    (part === "verdict" ? choices.querySelector("button") : field).focus();
  });
  for (const button of choices.querySelectorAll("button")) {
    button.addEventListener("click", () => say(false, button.dataset.value));
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (part === "caption" && text) say(false, text);
    if (part === "tags") say(false, words.tagList(text));
  });
  return root;
}
