// Small helpers for nodes. Text goes in by textContent only.

export const $ = (id) => document.getElementById(id);

/** A new element: attributes by name, a class as `class`, data as `dataset`, listeners as `onclick`; then children. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "dataset") Object.assign(node.dataset, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function button(label, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, label);
}

/** One of the page's icons, drawn in the colour of the text; 24 by 24. */
export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "icon");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  svg.firstChild.setAttribute("d", path);
  return svg;
}

export const ICONS = {
  more: "M5 12h.01M12 12h.01M19 12h.01",
  left: "m15 6-6 6 6 6",
  right: "m9 6 6 6-6 6",
  cross: "M6 6l12 12M18 6 6 18",
};

let noticeTimer = 0;

/** Say something at the edge of the page for some seconds, with something to do about it if there is. */
export function notice(text, label = "", action = null, seconds = 8) {
  const box = $("notice");
  clearTimeout(noticeTimer);
  const close = () => {
    clearTimeout(noticeTimer);
    box.replaceChildren();
  };
  const act = () => {
    close();
    action();
  };
  box.replaceChildren(
    el("div", { class: "notice" }, el("span", {}, text), action && button(label, act, { class: "link" }),
      button(icon(ICONS.cross), close, { class: "round", "aria-label": "Close" })),
  );
  noticeTimer = setTimeout(close, 1000 * seconds);
}

/** Have the browser save a text, or a blob, as a file. */
export function save(name, content, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Put a text on the clipboard; `from` says so for a moment. */
export async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that did not come by HTTPS have no clipboard: select the text in a field and copy it the old way.
    const field = document.body.appendChild(el("textarea", { "aria-label": "Copied text" }));
    field.value = text;
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const label = from.textContent;
  if (label === "Copied") return;
  from.textContent = "Copied";
  setTimeout(() => (from.textContent = label), 1200);
}

/** What is kept under a name in this browser, or the other value. */
export function kept(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function keep(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // storage is full or forbidden: it holds as long as the page
  }
}
