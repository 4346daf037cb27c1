// Conversations and their messages, kept in this browser's IndexedDB. Where it is forbidden they live as long as the
// page. Tabs tell each other what changed; each message is a record of its own, so that no tab writes over another's.

const NAME = "svdengine";
const FORGET_AFTER = 60_000; // milliseconds for which what was deleted can come back

export class Store {
  /** `tables`: what reads and writes records; see `openStore`. */
  constructor(tables, lasting) {
    this.tables = tables;
    this.lasting = lasting; // whether it outlives the page
    this.channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(NAME) : null;
  }

  /** Call `listener` with the id of a conversation that another tab changed. */
  onChange(listener) {
    this.channel?.addEventListener("message", ({ data }) => listener(data));
  }

  /** All that are not deleted, the latest first. */
  async conversations() {
    const all = await this.tables.all("conversations");
    return all.filter((each) => !each.deleted).sort((a, b) => b.changed - a.changed);
  }

  async conversation(id) {
    const found = await this.tables.get("conversations", id);
    return found?.deleted ? undefined : found;
  }

  async messages(conversation) {
    return this.tables.of(conversation);
  }

  /** Add a conversation, or change some of its fields; the others stay as they are, whoever wrote them. */
  async change(id, fields) {
    await this.tables.merge("conversations", id, fields);
    this.channel?.postMessage(id);
  }

  /** Add a message, or change some of its fields. */
  async write(message) {
    await this.tables.merge("messages", message.id, message);
    this.channel?.postMessage(message.conversation);
  }

  /** Drop a message that nothing follows. */
  async discard(message) {
    await this.tables.drop(message.id);
    this.channel?.postMessage(message.conversation);
  }

  /** Take conversations away; `restore` brings them back within a minute. */
  async remove(ids) {
    for (const id of ids) await this.change(id, { deleted: Date.now() });
  }

  async restore(ids) {
    for (const id of ids) await this.change(id, { deleted: 0 });
  }

  /** Forget what was deleted longer ago than it can come back. */
  async purge(now = Date.now()) {
    const old = (await this.tables.all("conversations")).filter((c) => c.deleted && c.deleted < now - FORGET_AFTER);
    for (const { id } of old) await this.tables.forget(id);
  }

  /** Ids of conversations in whose title or messages all words of a text are. */
  async search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const texts = new Map((await this.conversations()).map((each) => [each.id, [each.title]]));
    for (const message of await this.tables.all("messages")) texts.get(message.conversation)?.push(message.content);
    const holds = (parts) => {
      const all = parts.join("\n").toLowerCase();
      return words.every((word) => all.includes(word));
    };
    return [...texts].filter(([, parts]) => holds(parts)).map(([id]) => id);
  }
}

/** The store of this browser, or one in memory where the browser gives none. */
export async function openStore() {
  try {
    return new Store(new Indexed(await opened()), true);
  } catch {
    return new Store(new Memory(), false);
  }
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Until what a transaction wrote is kept: before that a page which closes takes it back. */
const kept = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });

/** Records in IndexedDB. A write is over once it outlives the page. */
class Indexed {
  constructor(database) {
    this.database = database;
  }

  #table(name, mode = "readonly") {
    return this.database.transaction(name, mode).objectStore(name);
  }

  all(name) {
    return done(this.#table(name).getAll());
  }

  get(name, id) {
    return done(this.#table(name).get(id));
  }

  of(conversation) {
    return done(this.#table("messages").index("conversation").getAll(conversation));
  }

  /** In one transaction, so that no other tab writes between reading and writing. */
  async merge(name, id, fields) {
    const table = this.#table(name, "readwrite");
    const before = await done(table.get(id));
    table.put({ ...before, ...fields, id });
    await kept(table.transaction);
  }

  async drop(message) {
    const table = this.#table("messages", "readwrite");
    table.delete(message);
    await kept(table.transaction);
  }

  async forget(conversation) {
    const transaction = this.database.transaction(["conversations", "messages"], "readwrite");
    const messages = transaction.objectStore("messages");
    for (const id of await done(messages.index("conversation").getAllKeys(conversation))) messages.delete(id);
    transaction.objectStore("conversations").delete(conversation);
    await kept(transaction);
  }
}

/** The same without IndexedDB. */
class Memory {
  conversations = new Map();
  messages = new Map();

  async all(name) {
    return [...this[name].values()];
  }

  async get(name, id) {
    return this[name].get(id);
  }

  async of(conversation) {
    return [...this.messages.values()].filter((message) => message.conversation === conversation);
  }

  async merge(name, id, fields) {
    this[name].set(id, { ...this[name].get(id), ...fields, id });
  }

  async drop(message) {
    this.messages.delete(message);
  }

  async forget(conversation) {
    for (const { id } of await this.of(conversation)) this.messages.delete(id);
    this.conversations.delete(conversation);
  }
}
