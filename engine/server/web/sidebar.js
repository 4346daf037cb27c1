// The list of conversations: search, rename, delete with undo, export and import.

import { $, button, el, icon, ICONS, notice, save } from "./dom.js";
import { readText } from "./composer.js";
import { read, toJson, toMarkdown } from "./transfer.js";

const DAY = 86_400_000;

export class Sidebar {
  #store;
  #does;
  #current = null;
  #asked = 0;

  /** `does` has what a click does: open(id), begin(), and gone(ids) for what was deleted. */
  constructor(store, does) {
    this.#store = store;
    this.#does = does;
    $("search").addEventListener("input", () => this.refresh());
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && $("search").value) {
        event.stopPropagation();
        $("search").value = "";
        this.refresh();
      } else if (event.key === "ArrowDown") {
        event.preventDefault();
        $("conversations").querySelector(".open")?.focus();
      }
    });
    $("export").addEventListener("click", () => this.#exportAll());
    $("import").addEventListener("click", () => $("import-file").click());
    $("import-file").addEventListener("change", async () => {
      await this.import($("import-file").files);
      $("import-file").value = "";
    });
    $("show-list").addEventListener("click", () => this.toggle());
    $("hide-list").addEventListener("click", () => this.toggle(false));
    $("shade").addEventListener("click", () => this.toggle(false));
    $("list").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.#narrow) this.toggle(false);
    });
    this.toggle(!this.#narrow);
    matchMedia("(max-width: 860px)").addEventListener("change", () => this.toggle(!this.#narrow));
  }

  get #narrow() {
    return matchMedia("(max-width: 860px)").matches;
  }

  /** Show or hide the list; on a narrow screen it lies above the page. */
  toggle(open = document.body.classList.contains("no-list")) {
    document.body.classList.toggle("no-list", !open);
    $("list").inert = !open;
    $("show-list").setAttribute("aria-expanded", String(open));
    $("shade").hidden = !(open && this.#narrow);
    if (open && this.#narrow) $("hide-list").focus();
  }

  search() {
    this.toggle(true);
    $("search").focus();
    $("search").select();
  }

  select(id) {
    this.#current = id;
    for (const node of $("conversations").querySelectorAll("li[data-id]")) this.#mark(node);
  }

  #mark(node) {
    const open = node.querySelector(".open");
    if (node.dataset.id === this.#current) open?.setAttribute("aria-current", "true");
    else open?.removeAttribute("aria-current");
  }

  async refresh() {
    const asked = ++this.#asked;
    const words = $("search").value.trim();
    const all = await this.#store.conversations();
    const found = words ? new Set(await this.#store.search(words)) : null;
    if (asked !== this.#asked) return; // a later one is under way
    const shown = found ? all.filter(({ id }) => found.has(id)) : all;
    const nodes = [];
    let group = "";
    for (const conversation of shown) {
      const name = groupOf(conversation.changed);
      if (name !== group) nodes.push(el("li", { class: "group" }, (group = name)));
      nodes.push(this.#row(conversation));
    }
    $("conversations").replaceChildren(...nodes);
    $("nothing").hidden = shown.length > 0;
    $("nothing").textContent = words ? "Nothing found" : this.#store.lasting ? "No conversations yet" : "This browser keeps nothing: conversations end with the page";
  }

  #row(conversation) {
    const menu = button(icon(ICONS.more), () => this.#openMenu(conversation, row, menu), { class: "round", "aria-label": `More about ${conversation.title}`, "aria-haspopup": "menu" });
    const open = button(conversation.title, () => {
      this.#does.open(conversation.id);
      if (this.#narrow) this.toggle(false);
    }, { class: "open", title: conversation.title });
    const row = el("li", { "data-id": conversation.id }, open, menu);
    this.#mark(row);
    return row;
  }

  #openMenu(conversation, row, from) {
    const item = (label, act, more = {}) => button(label, () => {
      close();
      act();
    }, { role: "menuitem", ...more });
    const menu = el("div", { class: "menu", role: "menu", "aria-label": conversation.title },
      item("Rename", () => this.#rename(conversation, row)),
      item("Save as Markdown", () => this.#export(conversation, "md")),
      item("Save as JSON", () => this.#export(conversation, "json")),
      item("Delete", () => this.remove(conversation), { class: "bad" }));
    const close = () => {
      menu.remove();
      document.removeEventListener("pointerdown", outside, true);
    };
    const outside = (event) => menu.contains(event.target) || close();
    menu.addEventListener("keydown", (event) => {
      const items = [...menu.children];
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (step) {
        event.preventDefault();
        items.at((items.indexOf(document.activeElement) + step) % items.length).focus();
      } else if (event.key === "Escape" || event.key === "Tab") {
        event.stopPropagation();
        close();
        from.focus();
      }
    });
    document.addEventListener("pointerdown", outside, true);
    row.append(menu);
    menu.firstChild.focus();
  }

  #rename(conversation, row) {
    const field = el("input", { class: "rename", "aria-label": "Title", maxlength: "200" });
    field.value = conversation.title;
    let open = true;
    const end = async (keep) => {
      if (!open) return;
      open = false;
      const title = field.value.trim();
      if (keep && title) await this.#store.change(conversation.id, { title, named: true });
      await this.refresh();
      this.#does.renamed(conversation.id);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    });
    field.addEventListener("blur", () => end(true));
    row.replaceChildren(field);
    field.focus();
    field.select();
  }

  async remove(conversation) {
    const next = this.#does.gone(conversation.id);
    await this.#store.remove([conversation.id]);
    await this.refresh();
    notice(`“${conversation.title}” was deleted.`, "Undo", async () => {
      await this.#store.restore([conversation.id]);
      await this.refresh();
      if (next) this.#does.open(conversation.id);
    });
  }

  async #export(conversation, kind) {
    const messages = await this.#store.messages(conversation.id);
    const name = conversation.title.replace(/[^\p{L}\p{N} _-]/gu, "").trim().replace(/\s+/g, "-").slice(0, 60) || "conversation";
    if (kind === "md") save(`${name}.md`, toMarkdown({ conversation, messages }), "text/markdown");
    else save(`${name}.json`, toJson([{ conversation, messages }]), "application/json");
  }

  async #exportAll() {
    const all = await this.#store.conversations();
    if (all.length === 0) return notice("There are no conversations to save.");
    const items = [];
    for (const conversation of all) items.push({ conversation, messages: await this.#store.messages(conversation.id) });
    return save("svdengine-conversations.json", toJson(items), "application/json");
  }

  /** Add the conversations of files to those that are there. */
  async import(files) {
    let [count, last] = [0, null];
    for (const file of files) {
      try {
        for (const { conversation, messages } of read(file.name, await readFile(file))) {
          for (const message of messages) await this.#store.write(message);
          await this.#store.change(conversation.id, { ...conversation, changed: Date.now() });
          last = conversation.id;
          count++;
        }
      } catch (error) {
        notice(error.message);
      }
    }
    if (!last) return;
    await this.refresh();
    this.#does.open(last);
    notice(count === 1 ? "1 conversation was added." : `${count} conversations were added.`);
  }
}

/** Exports may be longer than a file that is attached to a question. */
async function readFile(file) {
  if (file.size <= 1 << 20) return readText(file);
  return file.text();
}

function groupOf(time) {
  const days = Math.floor((new Date().setHours(24, 0, 0, 0) - time) / DAY);
  if (days < 1) return "Today";
  if (days < 2) return "Yesterday";
  return days < 8 ? "This week" : new Date(time).toLocaleDateString("en", { month: "long", year: "numeric" });
}
