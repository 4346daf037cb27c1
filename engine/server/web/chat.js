// The chat page: a conversation kept in this browser, answers streamed from the server that the page came from.

import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const SUGGESTIONS = [
  "Explain how a rainbow forms, in three sentences.",
  "Write a short poem about the sea.",
  "Write a Python function that reverses a list.",
];
const CONVERSATION = "svdengine.conversation";
const SETTINGS = "svdengine.settings";
const FOLLOW = 80; // pixels from the end within which the page follows the text

let messages = stored(CONVERSATION, []).filter((m) => typeof m?.content === "string");
let settings = stored(SETTINGS, {});
let model = null;
let running = null; // the AbortController of the answer that is being written

// A tab keeps its own conversation over a reload; a new tab goes on with the latest.
function stored(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(name) ?? localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function store(name, value) {
  try {
    const text = JSON.stringify(value);
    localStorage.setItem(name, text);
    sessionStorage.setItem(name, text);
  } catch {
    // storage is full or forbidden: the conversation lives as long as the page
  }
}

// --- the server ---

function headers() {
  const found = { "content-type": "application/json" };
  if (settings.key) found.authorization = `Bearer ${settings.key}`;
  return found;
}

async function explain(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      $("status").textContent = "An API key is needed";
      openSettings(settings.key ? "The server does not know this API key." : "The server asks for an API key.");
      return;
    }
    if (!response.ok) throw new Error(await explain(response));
    [model] = (await response.json()).data;
    $("model").textContent = document.title = model.id;
    $("status").textContent = model.chat
      ? `context of ${model.max_model_len} tokens`
      : "This model completes text and knows no conversations: use /v1/completions";
    $("input").disabled = !model.chat;
  } catch (error) {
    $("status").textContent = `Not connected: ${error.message}`;
  }
  updateSend();
}

/** The events of a streamed answer, parsed. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function body() {
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const turns = messages.filter((m) => m.content).map(({ role, content }) => ({ role, content }));
  const fields = { messages: [...system, ...turns], stream: true, stream_options: { include_usage: true } };
  if (settings.temperature !== undefined) fields.temperature = settings.temperature;
  if (settings.maxTokens !== undefined) fields.max_tokens = settings.maxTokens;
  return JSON.stringify(fields);
}

/** Have the conversation answered; the answer grows in the message that it is given. */
async function answer() {
  const message = { role: "assistant", content: "" };
  const request = body();
  const node = show(message);
  messages.push(message);
  running = new AbortController();
  busy(true);
  const pace = new Pace();
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: request, signal: running.signal,
    });
    if (response.status === 401) openSettings("The server asks for an API key.");
    if (!response.ok) throw new Error(await explain(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (choice?.delta.content) {
        message.content += choice.delta.content;
        pace.note();
      }
      if (choice?.finish_reason === "length") message.cut = true;
      if (event.usage) message.figures = figures(event.usage);
      soon(node, message, pace.text());
    }
  } catch (error) {
    if (running.signal.aborted) message.stopped = true;
    else message.error = error instanceof TypeError ? "The server cannot be reached." : error.message;
  } finally {
    message.figures ??= message.content ? pace.text() : "";
    running = null;
    busy(false);
    fill(node, message);
    keep();
  }
}

/** Pieces a second while the answer comes; the server tells the exact figure at its end. */
class Pace {
  count = 0;
  started = 0;

  note() {
    this.started ||= performance.now();
    this.count++;
  }

  text() {
    const seconds = (performance.now() - this.started) / 1000;
    return this.count > 1 && seconds > 0.2 ? `${((this.count - 1) / seconds).toFixed(1)} tokens/s` : "";
  }
}

function figures(usage) {
  const measured = usage.svdengine ?? {};
  const found = [];
  if (measured.tokens_per_second) found.push(`${measured.tokens_per_second.toFixed(1)} tokens/s`);
  if (typeof measured.active_density === "number") {
    found.push(`${(100 * measured.active_density).toFixed(1)} % of neurons`);
  }
  found.push(`${usage.completion_tokens} tokens`);
  return found.join(" · ");
}

// --- what is shown ---

function show(message) {
  const node = document.createElement("article");
  node.className = `message ${message.role}`;
  const following = atEnd();
  $("messages").append(node);
  fill(node, message);
  if (following || message.role === "user") toEnd();
  $("welcome").hidden = true;
  return node;
}

/** Make the nodes of a message anew. */
function fill(node, message, pace = "") {
  const following = atEnd();
  const text = document.createElement("div");
  text.className = "text";
  const active = running !== null && node === $("messages").lastElementChild;
  if (message.role === "user") text.textContent = message.content;
  else if (message.content) text.append(render(message.content));
  else if (active) text.append(waiting());
  node.replaceChildren(text);
  if (message.role === "assistant") {
    if (message.error) node.append(errorBox(message.error, node === $("messages").lastElementChild));
    node.append(about(node, message, active, pace));
  }
  if (following) toEnd();
}

let frame = 0;

/** The same with the next picture, however many pieces come before it. */
function soon(node, message, pace) {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => running && fill(node, message, pace));
}

function waiting() {
  const dots = document.createElement("span");
  dots.className = "waiting";
  dots.setAttribute("aria-label", "The model reads");
  dots.append(...[1, 2, 3].map(() => document.createElement("i")));
  return dots;
}

function about(node, message, active, pace) {
  const line = document.createElement("div");
  line.className = "about";
  const notes = [active ? pace : message.figures, message.stopped && "stopped", message.cut && "length limit reached"];
  const found = line.appendChild(document.createElement("span"));
  found.className = "figures";
  found.title = "Speed, the share of FFN neurons that were computed, and length";
  found.textContent = notes.filter(Boolean).join(" · ");
  if (!active && message.content) line.append(button("Copy", { copy: message.content }));
  if (!active && !message.error && node === $("messages").lastElementChild) line.append(button("Again", { again: "" }));
  return line;
}

function errorBox(text, last) {
  const box = document.createElement("div");
  box.className = "error";
  box.setAttribute("role", "alert");
  box.appendChild(document.createElement("span")).textContent = text;
  if (last) box.append(button("Try again", { again: "" }));
  return box;
}

function button(label, data) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  Object.assign(made.dataset, data);
  return made;
}

function busy(is) {
  $("messages").setAttribute("aria-busy", String(is));
  $("send").classList.toggle("stop", is);
  $("send").setAttribute("aria-label", is ? "Stop" : "Send");
  updateSend();
}

function updateSend() {
  $("send").disabled = running === null && (!$("input").value.trim() || model?.chat === false);
}

function showAll() {
  $("messages").replaceChildren();
  for (const message of messages) show(message);
  $("welcome").hidden = messages.length > 0;
  toEnd();
}

function atEnd() {
  const box = $("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < FOLLOW;
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function fit() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function keep() {
  store(CONVERSATION, messages);
}

// --- what the user does ---

function send(text) {
  if (running || !text.trim() || model?.chat === false) return;
  const previous = $("messages").lastElementChild;
  messages.push({ role: "user", content: text.trim() });
  show(messages.at(-1));
  if (previous && messages.length > 1) fill(previous, messages.at(-2)); // only the last answer can be made again
  keep();
  $("input").value = "";
  fit();
  answer();
}

function again() {
  if (running || messages.at(-1)?.role !== "assistant") return;
  messages.pop();
  $("messages").lastElementChild.remove();
  answer();
}

function begin() {
  running?.abort();
  messages = [];
  keep();
  showAll();
  $("input").focus();
}

function openSettings(note = "") {
  $("system").value = settings.system ?? "";
  $("temperature").value = settings.temperature ?? "";
  $("max-tokens").value = settings.maxTokens ?? "";
  $("key").value = settings.key ?? "";
  $("settings-note").textContent = note;
  if (!$("settings").open) $("settings").showModal();
  if (note) $("key").focus();
}

function saveSettings() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  settings = {
    system: $("system").value.trim() || undefined,
    temperature: number("temperature"),
    maxTokens: number("max-tokens"),
    key: $("key").value.trim() || undefined,
  };
  store(SETTINGS, settings);
  connect();
}

async function copy(from) {
  const text = from.dataset.copy;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that did not come by HTTPS have no clipboard: select the text in a field and copy it the old way.
    const field = document.body.appendChild(document.createElement("textarea"));
    field.value = text;
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const label = from.textContent;
  from.textContent = "Copied";
  setTimeout(() => (from.textContent = label), 1200);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send($("input").value);
});
$("input").addEventListener("keydown", (event) => {
  const phone = matchMedia("(pointer: coarse)").matches;
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || phone) return;
  event.preventDefault();
  send($("input").value);
});
$("input").addEventListener("input", () => {
  fit();
  updateSend();
});
$("scroll").addEventListener("scroll", () => ($("down").hidden = atEnd()));
$("down").addEventListener("click", toEnd);
$("new").addEventListener("click", begin);
$("open-settings").addEventListener("click", () => openSettings());
$("cancel").addEventListener("click", () => $("settings").close());
$("settings").querySelector("form").addEventListener("submit", saveSettings);
$("messages").addEventListener("click", ({ target }) => {
  if (target.dataset.copy !== undefined) copy(target);
  if (target.dataset.again !== undefined) again();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("settings").open) running.abort();
});
addEventListener("pagehide", keep);

for (const text of SUGGESTIONS) {
  const made = button(text, {});
  made.addEventListener("click", () => send(text));
  $("suggestions").append(made);
}
showAll();
connect();
if (matchMedia("(pointer: fine)").matches) $("input").focus();
