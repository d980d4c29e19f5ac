/* What an accessibility checker looks for first: names for controls and pictures, headings in order, references that
 * lead somewhere, targets large enough to touch. Returns what is wrong. */
() => {
  const found = [];
  const shown = (node) => node.checkVisibility({visibilityProperty: true});
  const all = (selector) => [...document.querySelectorAll(selector)];
  const report = (what, nodes) => nodes.forEach((node) => found.push(`${what}: ${node.outerHTML.slice(0, 120)}`));
  const name = (node) =>
    (node.getAttribute("aria-label") ?? "") +
    node.textContent.trim() +
    [...node.querySelectorAll("img")].map((image) => image.alt).join("");

  report("no name", all("button, a[href], summary").filter((node) => shown(node) && !name(node)));
  report("no label", all("input").filter((node) => node.labels.length === 0));
  report("no alt", all("img").filter((node) => !node.hasAttribute("alt")));
  report("no description", all(".photo").filter((node) => !node.alt));
  report("no label", all("[role=img]").filter((node) => shown(node) && !node.getAttribute("aria-label")));
  report("icon that is read out", all("main svg").filter((node) => node.getAttribute("aria-hidden") !== "true"));

  let last = 0;
  for (const node of all("h1, h2, h3, h4").filter(shown)) {
    const level = Number(node.tagName[1]);
    if (level > last + 1) report(`heading ${level} after ${last}`, [node]);
    last = level;
  }
  if (all("h1").length !== 1) found.push("not one h1");

  const ids = all("[id]").map((node) => node.id);
  if (new Set(ids).size !== ids.length) found.push("an id twice");
  for (const attribute of ["aria-labelledby", "aria-describedby", "for"]) {
    const lost = (node) => !document.getElementById(node.getAttribute(attribute));
    report(`${attribute} refers to nothing`, all(`[${attribute}]`).filter(lost));
  }

  const small = (node) => Math.min(node.getBoundingClientRect().width, node.getBoundingClientRect().height) < 24;
  report("too small to touch", all("button, a.button, label.button, .opacity").filter((node) => shown(node) && small(node)));
  if (!document.documentElement.lang || !document.title) found.push("no language or no title");
  return found;
}
