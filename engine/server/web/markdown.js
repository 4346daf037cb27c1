// Markdown into nodes. The text of a model is not trusted: HTML in it is shown as text, what marked makes of the rest
// goes through DOMPurify with short lists of tags and attributes, and math and code are put in after that.

import { DOMPurify, hljs, katex, marked } from "./vendor/libraries.js";
import { button, copy, el } from "./dom.js";

const LONGEST = 200_000; // characters; more is shown as plain text
const LONGEST_CODE = 20_000; // characters that are coloured
const DEEPEST = 40; // marks of quotes or lists that nest; deeper ones would take the stack of the parser

const CLEAN = {
  ALLOWED_TAGS: ["p", "br", "strong", "em", "del", "code", "pre", "ul", "ol", "li", "input", "blockquote", "hr", "a",
    "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "span"],
  ALLOWED_ATTR: ["href", "title", "type", "checked", "disabled", "start", "align", "class", "data-language", "data-display"],
  ADD_URI_SAFE_ATTR: ["type", "start", "align", "data-language", "data-display"], // their values are no addresses
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escape = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

const MATH = [
  { name: "mathBlock", level: "block", display: true, begin: /\$\$|\\\[/, rule: /^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])[ \t]*(?:\n|$)/ },
  { name: "mathInline", level: "inline", display: false, begin: /\$|\\\(/, rule: /^(?:\\\(([^]+?)\\\)|\$(?![\s$])((?:\\.|[^\\\n$])+?)(?<![\s\\])\$(?![\d$]))/ },
  { name: "mathDisplay", level: "inline", display: true, begin: /\$\$|\\\[/, rule: /^(?:\$\$([^$]+?)\$\$|\\\[([^]+?)\\\])/ },
];

const parser = new marked.Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`, // nothing is loaded
    heading({ tokens, depth }) {
      const level = Math.min(depth + 1, 6); // the page has the first
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>\n`;
    },
    code: ({ text, lang }) =>
      `<pre data-language="${escape(/^[\w+#.-]*/.exec(lang ?? "")[0])}"><code>${escape(text)}</code></pre>\n`,
  },
});
parser.use({
  extensions: MATH.map(({ name, level, display, begin, rule }) => ({
    name,
    level,
    start: (source) => begin.exec(source)?.index,
    tokenizer(source) {
      const found = rule.exec(source);
      return found ? { type: name, raw: found[0], text: (found[1] ?? found[2]).trim() } : undefined;
    },
    renderer: ({ text }) => `<span class="math" data-display="${display ? 1 : 0}">${escape(text)}</span>${level === "block" ? "\n" : ""}`,
  })),
});

/** The nodes of a text. */
export function render(text) {
  if (text.length > LONGEST || tooDeep(text)) return plain(text);
  let found;
  try {
    found = DOMPurify.sanitize(parser.parse(text), CLEAN);
  } catch {
    return plain(text); // such as nesting that no stack holds
  }
  for (const pre of found.querySelectorAll("pre")) pre.replaceWith(codeBlock(pre.textContent.replace(/\n$/, ""), pre.dataset.language));
  for (const span of found.querySelectorAll("span.math")) showMath(span);
  for (const link of found.querySelectorAll("a")) finishLink(link);
  for (const table of found.querySelectorAll("table")) {
    const box = el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(box);
    box.append(table);
  }
  for (const box of found.querySelectorAll("input")) {
    box.setAttribute("aria-label", "Task");
    box.closest("li")?.classList.add("task");
  }
  return found;
}

function tooDeep(text) {
  return text.split("\n").some((line) => (/^[\s>*+-]*/.exec(line)[0].match(/[>*+-]/g) ?? []).length > DEEPEST && /[^\s>*+-]/.test(line))
    || /(?:[*_~[(]\s?){200}/.test(text);
}

function plain(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(el("p", { class: "plain" }, text));
  return fragment;
}

function finishLink(link) {
  if (!link.hasAttribute("href")) {
    link.replaceWith(...link.childNodes); // a scheme that is not safe
    return;
  }
  link.target = "_blank";
  link.rel = "noopener noreferrer";
}

function showMath(span) {
  const source = span.textContent;
  const display = span.dataset.display === "1";
  const holder = el("span", { class: display ? "math display" : "math", tabindex: display ? "0" : null });
  try {
    katex.render(source, holder, { displayMode: display, throwOnError: true, trust: false, strict: "ignore", maxExpand: 200, maxSize: 20 });
  } catch {
    holder.replaceChildren(el("code", {}, source)); // not TeX, or not yet all of it
  }
  span.replaceWith(holder);
}

function codeBlock(text, language) {
  const code = el("code", {});
  if (language && hljs.getLanguage(language) && text.length <= LONGEST_CODE) {
    const { value } = hljs.highlight(text, { language, ignoreIllegals: true });
    code.append(DOMPurify.sanitize(value, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }));
  } else {
    code.textContent = text;
  }
  const label = language ? `Code, ${language}` : "Code";
  return el("div", { class: "code" },
    el("div", { class: "bar" }, el("span", {}, language ?? ""), button("Copy", (event) => copy(text, event.currentTarget))),
    el("pre", { tabindex: "0", role: "region", "aria-label": label }, code),
  );
}
