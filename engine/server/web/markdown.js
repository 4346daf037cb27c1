// Light Markdown, made into DOM nodes. Text goes in by textContent only, so that no output of a model becomes HTML.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,4})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const SPANS = /(`+)(.+?)\1|\*\*(?=\S)(.+?)\*\*|__(?=\S)(.+?)__|\*(?=\S)([^*\n]+?)\*|(?<!\w)_(?=\S)([^_\n]+?)_(?!\w)/s;
const MAX_DEPTH = 8;

/** The nodes of a text. */
export function render(text) {
  const out = document.createDocumentFragment();
  blocks(text.split("\n"), out, 0);
  return out;
}

function blocks(lines, out, depth) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (fence) {
      let end = at + 1;
      while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end++;
      out.append(codeBlock(lines.slice(at + 1, end).join("\n"), fence[2]));
      at = end + 1;
    } else if (!line.trim()) {
      at++;
    } else if (HEADING.test(line)) {
      const [, marks, title] = HEADING.exec(line);
      spans(title, out.appendChild(document.createElement(`h${marks.length}`)), depth);
      at++;
    } else if (RULE.test(line)) {
      out.append(document.createElement("hr"));
      at++;
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      let end = at;
      while (end < lines.length && QUOTE.test(lines[end])) end++;
      const inner = lines.slice(at, end).map((each) => QUOTE.exec(each)[1]);
      blocks(inner, out.appendChild(document.createElement("blockquote")), depth + 1);
      at = end;
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      at = list(lines, at, out, depth);
    } else {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && !startsBlock(lines[end])) end++;
      spans(lines.slice(at, end).join("\n"), out.appendChild(document.createElement("p")), depth);
      at = end;
    }
  }
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || QUOTE.test(line) || RULE.test(line);
}

/** A list that begins at a line; returns the line after it. */
function list(lines, at, out, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const node = out.appendChild(document.createElement(ordered ? "ol" : "ul"));
  if (ordered) node.start = parseInt(mark, 10);
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > indent.length + 1 || item[1].length < indent.length) break;
    if (/\d/.test(item[2]) !== ordered) break;
    const inner = [item[3]];
    at++;
    while (at < lines.length && belongs(lines, at, indent.length)) {
      inner.push(lines[at].slice(Math.min(leading(lines[at]), indent.length + item[2].length + 1)));
      at++;
    }
    itemContent(inner, node.appendChild(document.createElement("li")), depth);
    while (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] ?? "")) at++;
  }
  return at;
}

/** Whether a line goes on with an item: it is indented more, or the item's paragraph simply goes on. */
function belongs(lines, at, indent) {
  const line = lines[at];
  if (!line.trim()) return at + 1 < lines.length && leading(lines[at + 1]) > indent + 1;
  if (leading(line) > indent + 1) return true;
  return lines[at - 1].trim() !== "" && !startsBlock(line);
}

function itemContent(lines, node, depth) {
  const only = lines.findIndex((line, i) => i > 0 && (!line.trim() || startsBlock(line)));
  const first = only < 0 ? lines : lines.slice(0, only);
  spans(first.join("\n"), node, depth);
  if (only >= 0) blocks(lines.slice(only), node, depth + 1);
}

function leading(line) {
  return line.length - line.trimStart().length;
}

/** Bold, italics and code inside a paragraph. */
function spans(text, node, depth) {
  let rest = text;
  for (let found = SPANS.exec(rest); found && depth < MAX_DEPTH; found = SPANS.exec(rest)) {
    node.append(rest.slice(0, found.index));
    const [, , code, bold, bold2, italic, italic2] = found;
    if (code !== undefined) {
      node.appendChild(document.createElement("code")).textContent = code;
    } else {
      const inner = document.createElement(bold ?? bold2 ? "strong" : "em");
      spans(bold ?? bold2 ?? italic ?? italic2, node.appendChild(inner), depth + 1);
    }
    rest = rest.slice(found.index + found[0].length);
  }
  node.append(rest);
}

function codeBlock(text, language) {
  const box = document.createElement("div");
  box.className = "code";
  const bar = box.appendChild(document.createElement("div"));
  bar.className = "bar";
  bar.appendChild(document.createElement("span")).textContent = language;
  const copy = bar.appendChild(document.createElement("button"));
  copy.type = "button";
  copy.dataset.copy = text;
  copy.textContent = "Copy";
  box.appendChild(document.createElement("pre")).appendChild(document.createElement("code")).textContent = text;
  return box;
}
