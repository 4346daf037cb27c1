// How messages are shown.

import { $, button, copy, el, icon, ICONS } from "./dom.js";
import { render } from "./markdown.js";
import { drawWeave } from "./meter.js";
import { versionsOf } from "./tree.js";

const FOLLOW = 80; // pixels from the end within which the page follows the text

/** The messages of a conversation. `does` has what buttons do: again, carryOn, edit, version, dropOldest, openFile. */
export class Thread {
  #does;
  #messages = []; // all versions
  #busy = false;
  #latest = null; // of the answer that grows
  #next = 0;
  #spent = 0;

  constructor(does) {
    this.#does = does;
    $("scroll").addEventListener("scroll", () => ($("down").hidden = this.atEnd()));
    $("down").addEventListener("click", () => this.toEnd());
  }

  /** Show a path of messages; `first`: the first one that the model reads, where older ones are left out. */
  show(messages, path, first = null) {
    this.#messages = messages;
    this.#busy = false;
    $("messages").replaceChildren();
    for (const message of path) {
      if (message.id === first && message !== path[0]) $("messages").append(divider());
      const node = $("messages").appendChild(el("article", { class: `message ${message.role}`, "data-id": message.id,
        "aria-label": message.role === "user" ? "Question" : "Answer" }));
      this.fill(node, message);
    }
    $("welcome").hidden = path.length > 0;
    this.toEnd();
  }

  node(message) {
    return [...$("messages").querySelectorAll(".message")].find((node) => node.dataset.id === message.id);
  }

  /** Make the nodes of an answer anew while it grows, a few times a second, and less often when they take long. */
  grow(message, run) {
    this.#busy = true;
    this.#latest = { ...message, content: run.text, figures: run.figures };
    if (this.#next) return;
    this.#next = setTimeout(() => {
      this.#next = 0;
      if (!this.#busy) return;
      const begun = performance.now();
      const node = this.node(this.#latest);
      if (node) this.fill(node, this.#latest, true);
      this.#spent = performance.now() - begun;
    }, Math.max(40, 5 * this.#spent));
  }

  /** Show an answer as it stays. */
  finish(message) {
    this.#busy = false;
    const node = this.node(message);
    if (node) this.fill(node, message);
  }

  /** Make the nodes of a message. */
  fill(node, message, growing = false) {
    const following = this.atEnd();
    const last = node === $("messages").lastElementChild;
    if (message.role === "user") this.#fillQuestion(node, message);
    else this.#fillAnswer(node, message, growing, last);
    if (following) this.toEnd();
  }

  #fillQuestion(node, message) {
    const files = (message.files ?? []).map((file) =>
      button(file.name, () => this.#does.openFile(file), { class: "chip", title: "Show this file" }));
    const about = el("div", { class: "about" }, this.#versions(message),
      button("Edit", () => this.#edit(node, message)), button("Copy", (event) => copy(message.content, event.currentTarget)));
    node.replaceChildren(files.length ? el("div", { class: "files" }, ...files) : "",
      el("div", { class: "text", dir: "auto" }, message.content), about);
  }

  #fillAnswer(node, message, growing, last) {
    const text = el("div", { class: "text", dir: "auto" });
    if (message.content) text.append(render(message.content));
    else if (growing || message.growing) text.append(waiting());
    else if (!message.error && !message.stopped) text.append(el("p", { class: "silent" }, "The model ended its answer at once."));
    const parts = [text];
    if (message.error) parts.push(this.#errorBox(message, last));
    if (!growing && message.weave) parts.push(weave(message.weave));
    parts.push(this.#about(message, growing || message.growing, last));
    node.replaceChildren(...parts);
    for (const canvas of node.querySelectorAll("canvas.weave")) drawWeave(canvas, message.weave);
  }

  #about(message, growing, last) {
    const notes = [message.figures, message.setting, message.stopped && "stopped", message.cut && "length limit reached"];
    const figures = el("span", { class: "figures", title: "Speed, the share of FFN neurons that were computed, and length" },
      notes.filter(Boolean).join(" · "));
    const line = el("div", { class: "about" }, figures);
    if (growing) return line;
    const actions = el("span", { class: "actions" }, this.#versions(message));
    if (message.content) actions.append(button("Copy", (event) => copy(message.content, event.currentTarget)));
    if (!message.error) actions.append(button("Again", () => this.#does.again(message)));
    if (last && !message.error && message.content && (message.cut || message.stopped)) {
      actions.append(button("Go on", () => this.#does.carryOn(message)));
    }
    line.append(actions);
    return line;
  }

  #versions(message) {
    const { all, at } = versionsOf(this.#messages, message);
    if (all.length < 2) return null;
    const to = (step, label, path) => {
      const made = button(icon(path), () => this.#does.version(all[at + step]), { "aria-label": label, class: "step" });
      made.disabled = !all[at + step];
      return made;
    };
    return el("span", { class: "versions", role: "group", "aria-label": `Version ${at + 1} of ${all.length}` },
      to(-1, "Earlier version", ICONS.left), el("span", {}, `${at + 1} / ${all.length}`), to(1, "Later version", ICONS.right));
  }

  #edit(node, message) {
    const field = el("textarea", { "aria-label": "Edit the question", rows: Math.min(12, message.content.split("\n").length + 1) });
    field.value = message.content;
    const form = el("form", { class: "edit", onsubmit: (event) => {
      event.preventDefault();
      if (field.value.trim()) this.#does.edit(message, field.value.trim());
    } }, field, el("div", { class: "row" }, button("Cancel", () => this.fill(node, message), { class: "quiet" }),
      el("button", { class: "main", type: "submit" }, "Send")));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        this.fill(node, message);
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    node.replaceChildren(form);
    field.focus();
  }

  #errorBox(message, last) {
    const box = el("div", { class: "error", role: "alert" }, el("span", {}, message.error));
    if (!last) return box;
    if (message.full) box.append(button("Go on without the oldest turns", () => this.#does.dropOldest(message)));
    else box.append(button("Try again", () => this.#does.again(message)));
    return box;
  }

  /** Open the last question for editing. */
  editLast() {
    const node = [...$("messages").querySelectorAll(".message.user")].at(-1);
    const message = this.#messages.find((each) => each.id === node?.dataset.id);
    if (message) this.#edit(node, message);
  }

  redraw() {
    for (const canvas of $("messages").querySelectorAll("canvas.weave")) {
      const { id } = canvas.closest(".message").dataset;
      drawWeave(canvas, this.#messages.find((message) => message.id === id).weave);
    }
  }

  atEnd() {
    const box = $("scroll");
    return box.scrollHeight - box.scrollTop - box.clientHeight < FOLLOW;
  }

  toEnd() {
    $("scroll").scrollTop = $("scroll").scrollHeight;
  }
}

function divider() {
  return el("p", { class: "divider" }, "Turns above are not read any more: the context is full");
}

function weave({ layers, data }) {
  const count = data.length / layers;
  const canvas = el("canvas", { class: "weave", role: "img",
    title: "A column a token, a row a layer; the brighter, the more of its neurons were computed",
    "aria-label": `Neurons computed, by layer, for ${count} tokens` });
  canvas.style.width = `min(100%, ${3 * count}px)`;
  canvas.style.height = `${Math.min(72, Math.max(24, 1.5 * layers))}px`;
  return canvas;
}

function waiting() {
  return el("span", { class: "waiting", role: "status" }, el("span", { class: "hidden" }, "The model reads"), el("i"), el("i"), el("i"));
}
