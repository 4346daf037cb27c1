// Where a question is written: the text, and text files that go with it.

import { $, button, el, icon, ICONS, notice } from "./dom.js";
import { countText } from "./api.js";
import { fenced } from "./transfer.js";

const LARGEST = 1 << 20; // bytes of a file
const MOST = 8; // files of a question

/** What the model reads of a question with files. */
export function withFiles(content, files = []) {
  return [...files.map(({ name, text }) => `${name}:\n${fenced(text)}`), content].filter(Boolean).join("\n\n");
}

export class Composer {
  files = [];
  #submit;

  /** `submit` is called with a text and files; `changed` when either changes. */
  constructor(submit, changed) {
    this.#submit = submit;
    this.changed = changed;
    const input = $("input");
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    input.addEventListener("keydown", (event) => {
      const phone = matchMedia("(pointer: coarse)").matches;
      if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing || phone) return;
      event.preventDefault();
      this.send();
    });
    input.addEventListener("input", () => this.fit());
    input.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length === 0) return;
      event.preventDefault();
      this.add(event.clipboardData.files);
    });
    $("attach").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => {
      this.add($("file").files);
      $("file").value = "";
    });
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files.length > 0) this.add(event.dataTransfer.files);
    });
  }

  send() {
    this.#submit($("input").value.trim(), this.files);
  }

  clear() {
    $("input").value = "";
    this.files = [];
    this.#show();
    this.fit();
  }

  get empty() {
    return !$("input").value.trim() && this.files.length === 0;
  }

  fit() {
    const input = $("input");
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
    this.changed();
  }

  /** Attach files. One that is no text, or too large, is refused with a reason. */
  async add(files) {
    for (const file of files) {
      try {
        if (this.files.length >= MOST) throw new Error(`At most ${MOST} files go with a question.`);
        this.files.push({ name: file.name, text: await readText(file) });
      } catch (error) {
        notice(error.message);
      }
    }
    this.#show();
    this.changed();
  }

  #show() {
    $("files").replaceChildren(...this.files.map((file) => {
      const size = el("span", { class: "size" });
      const chip = el("span", { class: "chip" }, el("span", { class: "name" }, file.name), size, button(icon(ICONS.cross), () => {
        this.files = this.files.filter((each) => each !== file);
        this.#show();
        this.changed();
        $("input").focus();
      }, { class: "round", "aria-label": `Remove ${file.name}` }));
      countText(file.text).then((count) => (size.textContent = `${count.toLocaleString("en")} tokens`), () => {});
      return chip;
    }));
    $("files").hidden = this.files.length === 0;
  }
}

/** The text of a file. Throws an Error for one that is too large or is no text. */
export async function readText(file) {
  if (file.size > LARGEST) throw new Error(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; at most 1 MB is read.`);
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (text.includes("\0")) throw new Error();
    return text.replace(/\r\n?/g, "\n").trimEnd();
  } catch {
    throw new Error(`${file.name} is not a text file: it is not UTF-8.`);
  }
}
