// Keys that work everywhere on the page. The dialog in index.html lists them.

import { $ } from "./dom.js";

/** `does`: stop, begin, search, list, settings, sideBySide, editLast; and busy, whether an answer is written. */
export function listen(does) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.altKey) return;
    const dialog = document.querySelector("dialog[open]");
    const control = event.ctrlKey || event.metaKey;
    const name = `${control ? "ctrl+" : ""}${event.shiftKey ? "shift+" : ""}${event.key.toLowerCase()}`;
    const act = dialog ? null : found(name, event.target, does);
    if (!act) return;
    event.preventDefault();
    act();
  });
}

function found(name, target, does) {
  const writing = target.matches?.("input:not([type=range]), textarea, select");
  const inQuestion = target === $("input");
  if (name === "escape" && does.busy()) return does.stop;
  if (name === "ctrl+k") return does.search;
  if (name === "ctrl+shift+o") return does.begin;
  if (name === "ctrl+b") return does.list;
  if (name === "ctrl+.") return does.settings;
  if (name === "ctrl+enter" && inQuestion && !$("sparsity").hidden) return does.sideBySide;
  if (name === "arrowup" && inQuestion && !target.value && !does.busy()) return does.editLast;
  if (name === "ctrl+/" || (name === "shift+?" && !writing)) return () => $("shortcuts").showModal();
  return null;
}
