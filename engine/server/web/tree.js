// A conversation is a tree of messages: an edited question or another answer is one more child of the same parent.
// Nothing is ever written over, so that all versions stay, and two tabs cannot lose each other's words.

/** Messages by parent; those of one parent in the order in which they were made. */
export function childrenOf(messages) {
  const found = new Map();
  for (const message of [...messages].sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1))) {
    const parent = message.parent ?? null;
    found.set(parent, [...(found.get(parent) ?? []), message]);
  }
  return found;
}

/** The messages from the root to the one named `leaf`; without one that exists, along the newest children. */
export function pathTo(messages, leaf) {
  const known = new Map(messages.map((message) => [message.id, message]));
  const path = [];
  const seen = new Set();
  let at = known.get(leaf);
  while (at && !seen.has(at.id)) {
    seen.add(at.id);
    path.unshift(at);
    at = known.get(at.parent);
  }
  if (path.length > 0) return path;
  return descend(childrenOf(messages), null);
}

/** From below a message down to a leaf, along the newest children. */
export function descend(children, from) {
  const path = [];
  const seen = new Set();
  for (let at = children.get(from)?.at(-1); at && !seen.has(at.id); at = children.get(at.id)?.at(-1)) {
    seen.add(at.id);
    path.push(at);
  }
  return path;
}

/** The versions of a message, itself among them, and its place there. */
export function versionsOf(messages, message) {
  const all = childrenOf(messages).get(message.parent ?? null) ?? [message];
  return { all, at: all.findIndex((each) => each.id === message.id) };
}

/** The leaf below another version of a message. */
export function leafOf(messages, message) {
  return descend(childrenOf(messages), message.id).at(-1)?.id ?? message.id;
}

/** A title from the first question: its first line, cut at a word. */
export function titleOf(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  if (line.length <= 48) return line || "New chat";
  const cut = line.slice(0, 48);
  return `${cut.includes(" ") ? cut.slice(0, cut.lastIndexOf(" ")) : cut}…`;
}

/** An id that no other tab or machine makes; pages without HTTPS have no crypto.randomUUID. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
