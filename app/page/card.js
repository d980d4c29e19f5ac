/* One picture's card: builds it from the template and shows each state and the answer.
 *
 * Everything that comes from a file or the server goes in through textContent, attributes or custom properties, never
 * as markup. Knows no HTTP and no queue: the page calls it and hands in what its buttons do. */

import * as words from "./words.js";

const template = document.querySelector("#card");
let made = 0;

export class Card {
  /* file: File. credit: who made a sample, or "". act: {retry, remove, heat}, called with this card. */
  constructor(file, credit, act) {
    this.file = file;
    this.answer = null;
    this.root = template.content.firstElementChild.cloneNode(true);
    this.urls = {photo: URL.createObjectURL(file), json: ""};
    this.state = "waiting";

    const id = `card-${++made}`;
    this.part("name").id = id;
    this.root.querySelector("article").setAttribute("aria-labelledby", id);
    this.part("name").textContent = file.name || "pasted picture";
    this.part("name").title = file.name;
    this.fill("credit", credit);
    this.part("remove").querySelector(".sr").textContent = `Remove ${this.name}`;
    this.part("json").querySelector(".sr").textContent = ` of ${this.name}`;

    const photo = this.part("photo");
    photo.alt = `${this.name}, not described yet`;
    photo.addEventListener("load", () => this.fit(photo.naturalWidth / photo.naturalHeight));
    photo.addEventListener("error", () => {
      this.part("frame").hidden = true;
      this.part("no-preview").hidden = false;
    });
    photo.src = this.urls.photo;

    this.part("remove").addEventListener("click", () => act.remove(this));
    this.part("retry").addEventListener("click", () => act.retry(this));
    this.part("again").addEventListener("click", () => act.retry(this));
    this.part("heat-button").addEventListener("click", () => act.heat(this));
    this.part("opacity").addEventListener("input", () => this.setOpacity());
    this.setOpacity();
  }

  get name() {
    return this.part("name").textContent;
  }

  part(name) {
    return this.root.querySelector(`.${name}`);
  }

  /* Put text into a part, which is hidden while it has none. */
  fill(name, text) {
    this.part(name).textContent = text;
    this.part(name).hidden = !text;
  }

  /* The frame takes the picture's own shape inside the 4:3 box, so that the heat map lies exactly over it. */
  fit(ratio) {
    const frame = this.part("frame").style;
    frame.setProperty("--ratio", ratio);
    frame.setProperty("--width", `${Math.min(1, ratio / (4 / 3)) * 100}%`);
  }

  setState(state, text = "") {
    this.state = state;
    this.root.dataset.state = state;
    this.root.querySelector("article").setAttribute("aria-busy", String(state === "waiting" || state === "analysing"));
    this.part("progress").hidden = !text;
    this.part("progress-text").textContent = text;
    this.part("skeleton").hidden = state !== "waiting" && state !== "analysing";
    this.part("problem").hidden = state !== "failed";
    this.part("answer").hidden = state !== "done";
  }

  waiting(text) {
    this.setState("waiting", text);
  }

  analysing() {
    this.hideHeat();
    this.setState("analysing", "Analysing…");
  }

  failed({code, detail}) {
    this.setState("failed");
    this.part("problem-text").textContent = words.problemText(code);
    this.fill("problem-detail", detail);
    this.part("retry").hidden = !words.worthRetrying(code);
  }

  /* answer: an annotation record. thresholds: {human_below, ai_above} or null. Returns what to announce. */
  done(answer, thresholds) {
    this.answer = answer;
    this.setState("done");
    const verdict = this.showVerdict(answer.detection, thresholds);
    const caption = answer.caption?.text ?? "";
    this.fill("caption", caption);
    this.part("photo").alt = caption || `${this.name}, without a caption`;
    this.showTags(answer.tags ?? []);
    const gaps = answer.errors ?? [];
    this.part("gaps").replaceChildren(...gaps.map((gap) => element("li", words.gapText(gap))));
    this.part("gaps").hidden = gaps.length === 0;
    this.part("again").hidden = gaps.length === 0;
    this.showProvenance(answer.detection?.provenance);
    this.part("heat-button").hidden = !answer.detection;
    this.showTimings(answer.timings_ms ?? {});
    this.showModels(answer.models ?? {});
    this.linkJson();
    return `${this.name}: ${verdict}. ${caption}${gaps.length ? ` ${gaps.map(words.gapText).join(" ")}` : ""}`;
  }

  showVerdict(detection, thresholds) {
    const {text, icon} = words.VERDICTS[detection?.label] ?? {text: "No verdict", icon: "#i-none"};
    this.root.dataset.verdict = detection?.label ?? "none";
    this.part("label-text").textContent = text;
    this.part("label").querySelector("use").setAttribute("href", icon);
    this.part("probability").hidden = this.part("scale").hidden = !detection;
    if (!detection) {
      this.fill("limits", "");
      return text;
    }
    const share = words.percent(detection.ai_probability);
    this.part("percent").textContent = share;
    const scale = this.part("scale");
    scale.style.setProperty("--p", detection.ai_probability * 100);
    const known = typeof thresholds?.human_below === "number" && typeof thresholds?.ai_above === "number";
    scale.classList.toggle("marked", known);
    let limits = "";
    if (known) {
      scale.style.setProperty("--low", thresholds.human_below * 100);
      scale.style.setProperty("--high", thresholds.ai_above * 100);
      limits = `Human below ${words.percent(thresholds.human_below)}, AI above ${words.percent(thresholds.ai_above)}. `;
    }
    scale.setAttribute("aria-label", `Calibrated probability that AI made it: ${share}. ${limits}`.trim());
    this.fill("limits", `${limits}Not proof.`);
    return `${text}, ${share} probability of AI`;
  }

  showTags(tags) {
    this.part("tags").replaceChildren(...tags.map((tag) => element("li", tag)));
    this.part("tags").hidden = tags.length === 0;
  }

  showProvenance(provenance) {
    this.part("provenance").hidden = !provenance;
    if (!provenance) return;
    const signals = provenance.signals ?? [];
    this.part("provenance").dataset.c2pa = provenance.c2pa;
    this.part("provenance").querySelector("use").setAttribute("href", words.SEALS[provenance.c2pa] ?? "#i-seal");
    this.part("provenance-text").textContent = words.C2PA[provenance.c2pa] ?? "";
    this.fill("declared", words.declaredText(provenance.declared_ai));
    const box = this.part("signals");
    box.hidden = signals.length === 0;
    box.querySelector("summary").textContent = `${words.plural(signals.length, "trace", "traces")} of its origin in the file`;
    box.querySelector("dl").replaceChildren(
      ...signals.flatMap((signal) => [element("dt", words.signalName(signal)), element("dd", words.signalValue(signal))]),
    );
  }

  showTimings(timings) {
    const total = timings.total ?? Math.max(0, ...Object.values(timings));
    this.part("total").textContent = total ? words.duration(total) : "";
    const rows = Object.entries(timings).filter(([stage]) => stage !== "total");
    this.part("timings").replaceChildren(
      ...rows.flatMap(([stage, ms]) => {
        const value = element("dd", "");
        const bar = element("span", "", "bar");
        bar.style.setProperty("--share", `${total ? Math.min(100, (ms / total) * 100) : 0}%`);
        value.append(bar, element("span", words.duration(ms)));
        return [element("dt", words.STAGES[stage] ?? stage), value];
      }),
    );
  }

  showModels(models) {
    this.part("models").replaceChildren(
      ...Object.entries(models).flatMap(([stage, uri]) => [element("dt", words.modelName(stage)), element("dd", uri)]),
    );
  }

  linkJson() {
    URL.revokeObjectURL(this.urls.json);
    this.urls.json = URL.createObjectURL(new Blob([JSON.stringify(this.answer, null, 2)], {type: "application/json"}));
    this.part("json").href = this.urls.json;
    this.part("json").download = `${this.name.replace(/\.[^.]*$/, "")}.json`;
  }

  get heatShown() {
    return this.part("heat-button").getAttribute("aria-pressed") === "true";
  }

  heatNote(text, busy = false) {
    this.part("heat-note").textContent = text;
    this.part("heat-button").setAttribute("aria-busy", String(busy));
  }

  showHeat(png) {
    if (png) this.part("heat").src = `data:image/png;base64,${png}`;
    this.part("heat").alt = `Heat map over ${this.name}`;
    this.toggleHeat(true);
  }

  hideHeat() {
    this.toggleHeat(false);
  }

  toggleHeat(on) {
    this.part("heat").hidden = this.part("heat-bar").hidden = !on;
    this.part("heat-button").setAttribute("aria-pressed", String(on));
  }

  setOpacity() {
    this.part("heat").style.opacity = this.part("opacity").value / 100;
  }

  /* Take the card off the page and free what it held. */
  remove() {
    this.root.remove();
    Object.values(this.urls).forEach((url) => URL.revokeObjectURL(url));
  }
}

/* An element with a text. */
export function element(tag, text, className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}
