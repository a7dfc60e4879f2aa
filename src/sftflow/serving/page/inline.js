// Markdown inside a line: code, bold, italic, links. DOM nodes only; what is no Markdown is text, HTML too.
//
//   inline("a *b* `c`")  ->  [Text "a ", <em>b</em>, Text " ", <code>c</code>]
//
// Every loop is linear in the text (bracket pairs and code spans are found once), for a model may write anything.

// Together these bound how deep elements can stand in each other.
const MOST_OPEN = 6; // of one character; the outermost is forgotten
const LONGEST_RUN = 4;
const LONGEST_URL = 2000;
const SAFE = new Set(["http:", "https:", "mailto:"]);
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ALNUM = /[\p{L}\p{N}]/u;

const text = (words) => document.createTextNode(words);

export function element(tag, children = [], className = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  for (const child of children) node.append(child);
  return node;
}

// The address as the browser reads it, or null where it is not a plain link to elsewhere. `java\nscript:` is
// javascript: to a browser, so the browser's own reading is what is judged.
export function safeUrl(raw) {
  try {
    const url = new URL(raw);
    return SAFE.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(url, children) {
  const node = element("a", children);
  node.href = url;
  node.target = "_blank";
  node.rel = "noopener noreferrer";
  node.title = url;
  return node;
}

// Index of a code span's opening backtick -> [its content, where the text goes on]; inside it nothing else counts.
function codeSpans(source) {
  const runs = [...source.matchAll(/`+/g)].map((m) => ({ at: m.index, n: m[0].length }));
  const left = new Map(); // length -> numbers of the runs of that length, the next one last
  for (let i = runs.length - 1; i >= 0; i--) {
    if (!left.has(runs[i].n)) left.set(runs[i].n, []);
    left.get(runs[i].n).push(i);
  }
  const spans = new Map();
  for (let i = 0; i < runs.length; i++) {
    const { at, n } = runs[i];
    if (source[at - 1] === "\\") continue;
    const same = left.get(n);
    while (same.length && same.at(-1) <= i) same.pop();
    if (!same.length) continue;
    const close = same.at(-1);
    let content = source.slice(at + n, runs[close].at).replaceAll("\n", " ");
    if (content.startsWith(" ") && content.endsWith(" ") && content.trim()) content = content.slice(1, -1);
    spans.set(at, [content, runs[close].at + n]);
    i = close;
  }
  return spans;
}

// Index of each [ -> index of its ].
function brackets(source, spans) {
  const open = [];
  const pairs = new Map();
  for (let i = 0; i < source.length; i++) {
    if (spans.has(i)) i = spans.get(i)[1] - 1;
    else if (source[i] === "\\") i++;
    else if (source[i] === "[") open.push(i);
    else if (source[i] === "]" && open.length) pairs.set(open.pop(), i);
  }
  return pairs;
}

// `(url "title")` from index i on -> [url, index behind it], or null.
function destination(source, i) {
  if (source[i] !== "(") return null;
  const part = source.slice(i + 1, i + 1 + LONGEST_URL);
  let at = part.length - part.trimStart().length;
  let url = "";
  if (part[at] === "<") {
    const end = part.indexOf(">", at);
    if (end < 0) return null;
    url = part.slice(at + 1, end);
    at = end + 1;
  } else {
    const start = at;
    for (let depth = 0; at < part.length && !/\s/.test(part[at]); at++) {
      if (part[at] === "(") depth++;
      else if (part[at] === ")" && depth-- === 0) break;
    }
    url = part.slice(start, at);
  }
  const rest = part.slice(at).trimStart();
  at = part.length - rest.length;
  if (rest[0] === '"' || rest[0] === "'") {
    const end = rest.indexOf(rest[0], 1);
    if (end < 0) return null;
    at += end + 1;
    at += part.slice(at).length - part.slice(at).trimStart().length;
  }
  return part[at] === ")" ? [url.replaceAll("\n", ""), i + 1 + at + 1] : null;
}

export function inline(source, { links = true } = {}) {
  const spans = codeSpans(source);
  const pairs = brackets(source, spans);
  const out = []; // nodes
  const openers = { "*": [], _: [], "~": [] }; // {index in out, count}: runs that may still be closed
  let plain = "";

  function flush() {
    if (plain) out.push(text(plain));
    plain = "";
  }
  function add(node) {
    flush();
    out.push(node);
  }

  // Whether a run may open and may close: by what stands around it, as CommonMark has it, but stricter in words.
  function roles(char, run, before, after) {
    const gap = (c) => !c || /\s/.test(c);
    const mark = (c) => c !== undefined && PUNCTUATION.test(c);
    const opens = !gap(after) && (!mark(after) || gap(before) || mark(before));
    const closes = !gap(before) && (!mark(before) || gap(after) || mark(after));
    if (run > LONGEST_RUN || (char === "~" && run !== 2)) return [false, false];
    if (opens && closes && !mark(before) && !mark(after)) {
      // `2*3*4` and `snake_case` are themselves; ** may stand between letters, though not between digits.
      const inside = run === 1 || char === "_" || (/\d/.test(before) && /\d/.test(after));
      if (inside) return [false, false];
    }
    return [opens, closes];
  }

  function delimiters(char, run, before, after) {
    const [opens, closes] = roles(char, run, before, after);
    const stack = openers[char];
    let count = run;
    flush();
    while (closes && count && stack.length) {
      const top = stack.at(-1);
      const n = top.count >= 2 && count >= 2 ? 2 : 1;
      if (out.length === top.index + 1) break; // nothing between the two
      const node = element(char === "~" ? "del" : n === 2 ? "strong" : "em", out.splice(top.index + 1));
      top.count -= n;
      count -= n;
      out[top.index].data = char.repeat(top.count);
      if (!top.count) stack.pop();
      for (const other of Object.values(openers)) while (other.length && other.at(-1).index > top.index) other.pop();
      out.push(node);
    }
    if (!count) return;
    out.push(text(char.repeat(count)));
    if (!opens) return;
    stack.push({ index: out.length - 1, count });
    if (stack.length > MOST_OPEN) stack.shift();
  }

  for (let i = 0; i < source.length; ) {
    const char = source[i];
    if (spans.has(i)) {
      const [content, end] = spans.get(i);
      add(element("code", [text(content)]));
      i = end;
    } else if (char === "\\" && i + 1 < source.length && /[!-/:-@[-`{-~]/.test(source[i + 1])) {
      plain += source[i + 1];
      i += 2;
    } else if (char === "\n") {
      add(document.createElement("br"));
      i++;
    } else if ((char === "!" && source[i + 1] === "[") || (char === "[" && links)) {
      const open = char === "!" ? i + 1 : i;
      const close = pairs.get(open);
      const found = close === undefined ? null : destination(source, close + 1);
      const inside = close === undefined ? "" : source.slice(open + 1, close);
      if (found && char === "!") {
        // A picture from elsewhere would tell its server who is reading: it is named, not fetched.
        add(element("span", [text(`Image: ${inside} (${found[0]})`)], "image"));
        i = found[1];
      } else if (found && safeUrl(found[0])) {
        add(link(safeUrl(found[0]), inside ? inline(inside, { links: false }) : [text(found[0])]));
        i = found[1];
      } else {
        plain += char;
        i++;
      }
    } else if (char === "<" && links && /^<(https?:|mailto:)/i.test(source.slice(i, i + 9))) {
      const end = source.slice(i, i + LONGEST_URL).search(/[\s>]/);
      const url = end > 0 && source[i + end] === ">" ? safeUrl(source.slice(i + 1, i + end)) : null;
      if (url) add(link(url, [text(source.slice(i + 1, i + end))]));
      else plain += char;
      i += url ? end + 1 : 1;
    } else if (links && char.toLowerCase() === "h" && !(i && ALNUM.test(source[i - 1]))
               && /^https?:\/\/[^\s]/i.test(source.slice(i, i + 9))) {
      const [whole] = /^[^\s<>"`|]*/.exec(source.slice(i, i + LONGEST_URL));
      let url = whole;
      for (let n = 0; n < 9 && /[.,;:!?'*_~)\]}]$/.test(url); n++) {
        if (url.endsWith(")") && url.split("(").length >= url.split(")").length) break;
        url = url.slice(0, -1);
      }
      const safe = safeUrl(url);
      if (safe) add(link(safe, [text(url)]));
      else plain += url || char;
      i += url.length || 1;
    } else if (char === "*" || char === "_" || char === "~") {
      let end = i;
      while (source[end] === char) end++;
      delimiters(char, end - i, source[i - 1], source[end]);
      i = end;
    } else {
      plain += char;
      i++;
    }
  }
  flush();
  return out;
}
