// The chat page: conversations kept in this browser, answers streamed from the server that the page came from.

import * as api from "./api.js";
import { Compare } from "./compare.js";
import { Composer, withFiles } from "./composer.js";
import { fitting, showGauge } from "./context.js";
import { $, button, notice } from "./dom.js";
import { packed } from "./meter.js";
import { Run } from "./run.js";
import { Settings, showModel } from "./settings.js";
import { listen } from "./shortcuts.js";
import { Sidebar } from "./sidebar.js";
import { Sparsity } from "./sparsity.js";
import { openStore } from "./store.js";
import { Thread } from "./thread.js";
import { newConversation } from "./transfer.js";
import { leafOf, newId, pathTo, titleOf } from "./tree.js";

const SUGGESTIONS = [
  "Explain how a rainbow forms, in three sentences.",
  "Write a short poem about the sea.",
  "Write a Python function that reverses a list.",
];
const OPEN = "svdengine.open"; // of a tab: which conversation it shows
const SAVE_EVERY = 2000; // milliseconds between keeping an answer that grows

const store = await openStore();
const settings = new Settings(connect);
const sparsity = new Sparsity();
const compare = new Compare(sparsity);
const thread = new Thread({ again, carryOn, edit, version, dropOldest, openFile });
const composer = new Composer(send, updateSend);
const sidebar = new Sidebar(store, { open: openConversation, gone, renamed: reload });

let model = null;
let conversation = null; // null: a new one, which is kept with its first question
let messages = []; // all versions of the open conversation
let leaf = null; // the last message that is shown
let running = null; // the answer that is being written

// --- the server ---

async function connect() {
  api.useKey(settings.key);
  try {
    model = await api.model();
    $("model").textContent = document.title = model.id;
    $("status").textContent = model.chat
      ? about(model)
      : "This model completes text and knows no conversations: use /v1/completions";
    $("input").disabled = !model.chat;
    settings.use(model.svdengine);
    sparsity.use(model);
    showModel(model, model.svdengine?.version);
    refresh();
  } catch (error) {
    if (error.status === 401) {
      $("status").textContent = "An API key is needed";
      settings.open(settings.key ? "The server does not know this API key." : "The server asks for an API key.");
    } else {
      $("status").textContent = `Not connected: ${error.message}`;
    }
  }
  updateSend();
}

function about({ svdengine: info, max_model_len: size }) {
  if (!info) return `context of ${size} tokens`;
  const count = info.parameters >= 1e9 ? `${(info.parameters / 1e9).toFixed(1)} B` : `${Math.round(info.parameters / 1e6)} M`;
  return `${count} parameters · ${info.formats[0]} · ${info.device}`;
}

// --- the open conversation ---

const path = () => (messages.length ? pathTo(messages, leaf) : []);

async function openConversation(id) {
  if (conversation?.id === id && messages.length) return sidebar.select(id);
  running?.stop();
  const found = await store.conversation(id);
  if (!found) return begin();
  conversation = found;
  messages = settled(await store.messages(id));
  leaf = found.leaf;
  sessionStorage.setItem(OPEN, id);
  refresh();
  return undefined;
}

/** An answer that nobody has kept for a while was cut with the page that wrote it. */
function settled(found) {
  const live = Date.now() - 3 * SAVE_EVERY;
  return found.map((message) => (message.growing && (message.touched ?? message.created) < live
    ? { ...message, growing: false, stopped: true } : message));
}

function begin() {
  running?.stop();
  conversation = null;
  messages = [];
  leaf = null;
  sessionStorage.removeItem(OPEN);
  refresh();
  $("input").focus();
}

/** Show all of it anew. */
function refresh() {
  const shown = path();
  leaf = shown.at(-1)?.id ?? null;
  thread.show(messages, shown, conversation?.first ?? null);
  sidebar.select(conversation?.id ?? null);
  $("title").textContent = conversation?.title ?? "New chat";
  sparsity.recall(shown.findLast((message) => message.role === "assistant"));
  gauge();
  updateSend();
}

/** Take up what another tab, or a rename, changed. */
async function reload(id) {
  sidebar.refresh();
  if (id !== conversation?.id || running) return;
  const [found, all] = [await store.conversation(id), settled(await store.messages(id))];
  const before = messages.length;
  if (!found || running || id !== conversation?.id || all.length < before) return;
  conversation = found;
  messages = all;
  $("title").textContent = found.title;
  if (messages.length === before && !messages.some((message) => message.growing)) return;
  const at = messages.find((message) => message.id === leaf);
  if (at) leaf = leafOf(messages, at); // the other tab may have gone on from here
  refresh();
}

/** The conversation was deleted; true where it was the open one. */
function gone(id) {
  if (conversation?.id !== id) return false;
  begin();
  return true;
}

async function gauge() {
  const shown = path();
  const last = shown.at(-1);
  const size = model?.max_model_len;
  if (!size || shown.length === 0) return showGauge(0, shown.length ? size : 0);
  if (last.context) return showGauge(Math.min(last.context, size), size);
  if (!running) {
    const used = await api.countTokens([...settings.system, ...turns(shown)]).catch(() => 0);
    if (path().at(-1) === last && used) showGauge(Math.min(used, size), size);
  }
  return undefined;
}

// --- answers ---

/** What the model reads of messages: not those that failed. */
function turns(shown) {
  return shown.filter((m) => m.content || m.files?.length).map(({ role, content, files }) =>
    ({ role, content: role === "user" ? withFiles(content, files) : content }));
}

/** Keep a new message, and show it as the last. */
async function add(message) {
  messages.push(message);
  leaf = message.id;
  const news = { leaf, changed: Date.now(), deleted: 0 };
  if (await store.conversation(conversation.id)) {
    await store.write(message);
    await store.change(conversation.id, news);
    return;
  }
  // A new one, or one that another tab deleted: all of it.
  for (const each of messages) await store.write(each);
  await store.change(conversation.id, { ...conversation, ...news });
}

/** Have a question answered. `begun`: what the answer begins with. */
async function answer(question, begun = "") {
  const message = { id: newId(), conversation: conversation.id, parent: question.id, role: "assistant", content: begun,
    created: Date.now(), growing: true };
  const run = (running = new Run());
  const setting = Object.keys(sparsity.fields).length ? sparsity.setting.split(":")[0].toLowerCase() : undefined;
  busy(true);
  await add(message);
  refresh();
  sparsity.begin();
  const saving = setInterval(() => store.write({ ...message, content: begun + run.text, touched: Date.now() }), SAVE_EVERY);
  try {
    await run.go(await request(question, begun), (_, columns) => {
      sparsity.show(run, columns);
      thread.grow({ ...message, content: begun }, { text: begun + run.text, figures: run.figures });
    });
  } catch (error) {
    run.error = error;
  } finally {
    clearInterval(saving);
  }
  running = null;
  complete(message, run, begun, setting);
  await store.write({ ...message });
  busy(false);
  if (conversation?.id === message.conversation) finished(message, run);
  reload(message.conversation); // what other tabs wrote meanwhile
}

/** What is kept of an answer. */
function complete(message, run, begun, setting) {
  Object.assign(message, { content: begun + run.text, growing: false, figures: run.figures, stopped: run.stopped, cut: run.cut,
    speed: run.speed, density: run.density, context: run.context, setting });
  if (run.columns.length && model?.svdengine?.sparse) message.weave = packed(run.columns, model.svdengine.layers);
  const size = model?.max_model_len ?? Infinity;
  message.full = run.error?.code === "context_length_exceeded" || (run.cut && run.context >= size - 1);
  if (run.error) {
    message.error = run.error.message;
    if (run.error.status === 401) settings.open("The server asks for an API key.");
  } else if (message.full) {
    message.error = "The context is full.";
  }
}

function finished(message, run) {
  sparsity.end(run);
  thread.finish(message);
  gauge();
}

/** The body of a request: the turns up to a question, of which the oldest are left out where that was agreed to. */
async function request(question, begun) {
  const shown = pathTo(messages, question.id);
  let asked = turns(shown);
  if (begun) asked.push({ role: "assistant", content: begun });
  if (conversation.dropOldest) {
    const found = await fitting(settings.system, asked, model.max_model_len, settings.fields.max_tokens);
    conversation.first = found.first ? shown.filter((m) => m.content || m.files?.length)[found.first]?.id : null;
    asked = found.messages.slice(settings.system.length);
    await store.change(conversation.id, { first: conversation.first });
    thread.show(messages, path(), conversation.first);
  }
  const more = begun ? { continue_final_message: true, add_generation_prompt: false } : {};
  return { messages: [...settings.system, ...asked], ...settings.fields, ...sparsity.fields, ...more };
}

async function send(text, files) {
  if (running) return running.stop();
  if ((!text && files.length === 0) || model?.chat === false) return undefined;
  if (!conversation) {
    conversation = newConversation(titleOf(text || files[0].name));
    sessionStorage.setItem(OPEN, conversation.id);
  }
  const question = { id: newId(), conversation: conversation.id, parent: leaf, role: "user", content: text,
    created: Date.now(), ...(files.length ? { files } : {}) };
  composer.clear();
  await add(question);
  return answer(question);
}

/** Another version of an answer; in place of one that has nothing but an error. */
async function again(message) {
  const question = messages.find(({ id }) => id === message.parent);
  if (running || !question) return;
  if (!message.content) {
    messages = messages.filter(({ id }) => id !== message.id);
    await store.discard(message);
  }
  answer(question);
}

/** A version that goes on where an answer was cut. */
function carryOn(message) {
  const question = messages.find(({ id }) => id === message.parent);
  if (!running && question) answer(question, message.content);
}

/** Another version of a question, and its answer. */
async function edit(message, text) {
  if (running) return;
  const question = { ...message, id: newId(), content: text, created: Date.now() };
  await add(question);
  await answer(question);
}

async function version(message) {
  if (running) return;
  leaf = leafOf(messages, message);
  await store.change(conversation.id, { leaf });
  const box = $("scroll").scrollTop;
  refresh();
  $("scroll").scrollTop = box;
}

async function dropOldest(message) {
  conversation.dropOldest = true;
  await store.change(conversation.id, { dropOldest: true });
  if (message.content) carryOn(message);
  else again(message);
}

function openFile(file) {
  $("file-name").textContent = file.name;
  $("file-text").textContent = file.text;
  $("file-view").showModal();
}

// --- dense and sparse ---

function sideBySide() {
  if (running) return;
  const typed = $("input").value.trim();
  const shown = path();
  const at = shown.findLastIndex((message) => message.role === "user");
  if (!typed && at < 0) {
    notice("Type a question first.");
    $("input").focus();
    return;
  }
  const before = typed ? shown : shown.slice(0, at + 1);
  const asked = [...settings.system, ...turns(before), ...(typed ? [{ role: "user", content: withFiles(typed, composer.files) }] : [])];
  compare.start(typed || shown[at].content, { messages: asked, ...settings.fields }, model);
}

async function measure() {
  $("measure").disabled = true;
  const shown = path();
  const at = shown.findLastIndex((message) => message.role === "user");
  const asked = at < 0 ? [{ role: "user", content: SUGGESTIONS[0] }] : turns(shown.slice(0, at + 1));
  try {
    await sparsity.measure({ messages: [...settings.system, ...asked] });
  } catch (error) {
    notice(error.message);
  }
  $("measure").disabled = false;
}

// --- the rest ---

function busy(is) {
  $("messages").setAttribute("aria-busy", String(is));
  $("send").classList.toggle("stop", is);
  $("send").setAttribute("aria-label", is ? "Stop" : "Send");
  updateSend();
}

function updateSend() {
  $("send").disabled = running === null && (composer.empty || model?.chat === false);
  $("side").disabled = $("measure").disabled = running !== null;
}

/** A conversation that an earlier version of the page kept. */
async function takeOver() {
  const old = JSON.parse(localStorage.getItem("svdengine.conversation") ?? "null");
  localStorage.removeItem("svdengine.conversation");
  const kept = Array.isArray(old) ? old.filter((m) => typeof m?.content === "string" && m.content) : [];
  if (kept.length === 0) return;
  const made = newConversation(titleOf(kept[0].content));
  let parent = null;
  for (const [i, { role, content, figures }] of kept.entries()) {
    const message = { id: newId(), conversation: made.id, parent, role: role === "user" ? "user" : "assistant", content, figures, created: made.created + i };
    await store.write(message);
    parent = message.id;
  }
  await store.change(made.id, { ...made, leaf: parent });
}

for (const text of SUGGESTIONS) $("suggestions").append(button(text, () => send(text, [])));
for (const id of ["new", "new-in-list"]) $(id).addEventListener("click", begin);
$("open-settings").addEventListener("click", () => settings.open());
$("open-model").addEventListener("click", () => model && $("model-info").showModal());
$("side").addEventListener("click", sideBySide);
$("measure").addEventListener("click", measure);
document.addEventListener("theme", () => {
  sparsity.redraw();
  thread.redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));
listen({ stop: () => running?.stop(), begin, search: () => sidebar.search(), list: () => sidebar.toggle(), settings: () => settings.open(),
  sideBySide, editLast: () => thread.editLast(), busy: () => running !== null });
store.onChange(reload);

await takeOver().catch(() => {});
await store.purge().catch(() => {});
await sidebar.refresh();
const last = sessionStorage.getItem(OPEN);
if (last) await openConversation(last);
else refresh();
await connect();
if (matchMedia("(pointer: fine)").matches) $("input").focus();
