// Conversations as files: JSON with all versions, and Markdown of what is shown, for people.

import { childrenOf, newId, pathTo, titleOf } from "./tree.js";

const FORMAT = "svdengine-conversations";
const ROLES = ["user", "assistant"];
const MARK = /^<!-- svdengine: (user|assistant) -->$/;
const MOST = 64 << 20; // characters of a file that is read

/** JSON of conversations, each `{conversation, messages}`. */
export function toJson(items) {
  const conversations = items.map(({ conversation, messages }) => ({
    title: conversation.title,
    created: conversation.created,
    changed: conversation.changed,
    leaf: conversation.leaf ?? null,
    messages: messages.map(({ id, parent, role, content, created, files, figures, stopped, cut }) =>
      ({ id, parent: parent ?? null, role, content, created, files, figures, stopped, cut })),
  }));
  return `${JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1)}\n`;
}

/** Markdown of one conversation, along the versions that are shown. */
export function toMarkdown({ conversation, messages }) {
  const parts = [`# ${conversation.title.replace(/\s+/g, " ")}`];
  for (const { role, content, files = [] } of pathTo(messages, conversation.leaf)) {
    const attached = files.map((file) => `Attached: ${file.name}\n\n${fenced(file.text)}`);
    // A line that looks like our own mark would split the message when it is read again.
    const text = [...attached, content].join("\n\n").replace(/^( *)<!-- svdengine:/gm, "$1 <!-- svdengine:");
    parts.push(`<!-- svdengine: ${role} -->\n## ${role === "user" ? "Question" : "Answer"}\n\n${text}`);
  }
  return `${parts.join("\n\n")}\n`;
}

/** What a file holds, as `{conversation, messages}` with ids of their own. Throws an Error that says what is wrong. */
export function read(name, text) {
  if (text.length > MOST) throw new Error(`${name} is too large.`);
  const items = text.trimStart().startsWith("{") ? fromJson(name, text) : [fromMarkdown(name, text)];
  if (items.length === 0) throw new Error(`${name} holds no conversations.`);
  return items;
}

function fromJson(name, text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error(`${name} is not JSON.`);
  }
  if (value?.format !== FORMAT || !Array.isArray(value.conversations)) {
    throw new Error(`${name} is not an export of this page: "format" must be "${FORMAT}".`);
  }
  if (value.version !== 1) throw new Error(`${name} has version ${value.version}; this page reads version 1.`);
  return value.conversations.map((each, i) => checked(name, each, i));
}

/** A conversation of a file that nobody vouches for: every field is looked at, and ids are made anew. */
function checked(name, given, index) {
  const where = `${name}, conversation ${index + 1}`;
  if (!Array.isArray(given?.messages)) throw new Error(`${where}: "messages" is missing.`);
  const conversation = newConversation(text(given.title) || "Imported", given.created, given.changed);
  const ids = new Map(given.messages.map((message) => [message?.id, newId()]));
  if (ids.size < given.messages.length) throw new Error(`${where}: an id is missing, or there twice.`);
  const messages = given.messages.map((message, i) => {
    if (!ROLES.includes(message?.role) || typeof message.content !== "string") {
      throw new Error(`${where}, message ${i + 1}: a role, user or assistant, and content are needed.`);
    }
    const id = ids.get(message.id);
    const parent = message.parent ?? null;
    if (parent !== null && !ids.has(parent)) throw new Error(`${where}, message ${i + 1}: its parent is not there.`);
    const files = Array.isArray(message.files) ? message.files : [];
    return {
      id,
      conversation: conversation.id,
      parent: parent === null ? null : ids.get(parent),
      role: message.role,
      content: message.content,
      created: number(message.created) ?? conversation.created + i,
      files: files.filter((f) => text(f?.name) && typeof f.text === "string").map((f) => ({ name: f.name, text: f.text })),
      figures: typeof message.figures === "string" ? message.figures : undefined,
      stopped: message.stopped === true,
      cut: message.cut === true,
    };
  });
  if (reached(messages) < messages.length) throw new Error(`${where}: some messages follow none that begins.`);
  return { conversation: { ...conversation, leaf: ids.get(given.leaf) ?? messages.at(-1)?.id ?? null }, messages };
}

/** How many messages follow from a beginning. */
function reached(messages) {
  const children = childrenOf(messages);
  const left = [null];
  let count = -1;
  for (; left.length > 0; count++) left.push(...(children.get(left.pop()) ?? []).map(({ id }) => id));
  return count;
}

function fromMarkdown(name, source) {
  const lines = source.split("\n");
  const first = lines.findIndex((line) => MARK.test(line));
  if (first < 0) throw new Error(`${name} is not an export of this page: it has no "<!-- svdengine: user -->".`);
  const title = lines.slice(0, first).find((line) => line.startsWith("# "))?.slice(2).trim();
  const messages = [];
  for (const line of lines.slice(first)) {
    const mark = MARK.exec(line);
    if (mark) messages.push({ role: mark[1], lines: [] });
    else messages.at(-1).lines.push(line.replace(/^( *) <!-- svdengine:/, "$1<!-- svdengine:"));
  }
  const conversation = newConversation(title || titleOf(messages[0].lines.join("\n")));
  const made = messages.map(({ role, lines: own }, i) => ({
    id: newId(),
    conversation: conversation.id,
    role,
    content: own.slice(/^## (Question|Answer)$/.test(own[0]) ? 1 : 0).join("\n").trim(),
    created: conversation.created + i,
  }));
  made.forEach((message, i) => (message.parent = i ? made[i - 1].id : null));
  return { conversation: { ...conversation, leaf: made.at(-1).id }, messages: made };
}

export function newConversation(title, created = Date.now(), changed = Date.now()) {
  const now = Date.now();
  return { id: newId(), title, created: number(created) ?? now, changed: number(changed) ?? now, leaf: null };
}

/** A code block whose fence is longer than any in the text. */
export function fenced(content) {
  const longest = Math.max(2, ...(content.match(/`{3,}/g) ?? []).map((run) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${content}\n${fence}`;
}

const text = (value) => (typeof value === "string" ? value.trim().slice(0, 200) : "");
const number = (value) => (Number.isFinite(value) ? value : undefined);
