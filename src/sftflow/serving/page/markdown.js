// Markdown -> DOM nodes: paragraphs, headings, lists, quotes, tables, fenced code, rules. What is no Markdown is text;
// HTML is, too. Nothing here reads HTML, fetches a picture or runs what a model wrote.
//
//   draw(node, "# Hi\n- a\n- b")  ->  <h3>Hi</h3> <ul><li>a</li><li>b</li></ul>
//
// `draw` keeps the blocks that did not change, so that a reply can be drawn again with every token that comes.
import { codeBlock } from "./dom.js";
import { element, inline } from "./inline.js";

const DEEPEST = 8; // lists and quotes inside each other; what goes deeper stays text
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;

const indent = (line) => line.length - line.trimStart().length;
const blank = (line) => !line.trim();

// The fence that this line opens: {mark, indent, language}, or null.
function fence(line) {
  const found = /^( {0,3})(`{3,}|~{3,})/.exec(line);
  if (!found) return null;
  const rest = line.slice(found[0].length);
  if (found[2][0] === "`" && rest.includes("`")) return null;
  return { mark: found[2], indent: found[1].length, language: rest.trim().split(/\s/)[0] };
}

function cells(line) {
  const row = [""];
  for (let i = 0; i < line.length; i++) {
    if (line[i] === "\\" && line[i + 1] === "|") row[row.length - 1] += line[++i];
    else if (line[i] === "|") row.push("");
    else row[row.length - 1] += line[i];
  }
  if (row.length > 1 && blank(row[0])) row.shift();
  if (row.length > 1 && blank(row.at(-1))) row.pop();
  return row.map((cell) => cell.trim());
}

// The columns' alignments, where this is the line under a table's head; else null.
function alignments(head, line) {
  if (line === undefined || !head.includes("|") || !line.includes("-")) return null;
  const row = cells(line);
  if (row.length !== cells(head).length || !row.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return row.map((cell) => (cell.endsWith(":") ? (cell[0] === ":" ? "center" : "right") : ""));
}

const begins = (line) =>
  HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || fence(line) !== null || ITEM.test(line);

// Where the block that starts at line i ends.
function endOf(lines, i) {
  const line = lines[i];
  const opened = fence(line);
  if (opened) {
    for (let j = i + 1; j < lines.length; j++) {
      const closing = lines[j].trim();
      if (closing.length >= opened.mark.length && closing === opened.mark[0].repeat(closing.length)) return j + 1;
    }
    return lines.length; // it is still being written
  }
  if (HEADING.test(line) || RULE.test(line)) return i + 1;
  let j = i + 1;
  if (QUOTE.test(line)) {
    while (j < lines.length && !blank(lines[j]) && (QUOTE.test(lines[j]) || !begins(lines[j]))) j++;
    return j;
  }
  const item = ITEM.exec(line);
  if (item) {
    const same = (other) => other && (/\d/.test(other[2]) === /\d/.test(item[2])) && other[1].length < item[1].length + 2;
    let end = j;
    for (; j < lines.length; j++) {
      if (blank(lines[j])) continue;
      const inside = indent(lines[j]) >= item[1].length + 2;
      const goesOn = !blank(lines[j - 1]) && !begins(lines[j]); // a paragraph's next line, however it is indented
      if (!inside && !goesOn && !(same(ITEM.exec(lines[j])) && !RULE.test(lines[j]))) break;
      end = j + 1;
    }
    return end;
  }
  if (alignments(line, lines[j])) {
    while (j < lines.length && !blank(lines[j]) && lines[j].includes("|")) j++;
    return j;
  }
  while (j < lines.length && !blank(lines[j]) && !begins(lines[j]) && !alignments(lines[j], lines[j + 1])) j++;
  return j;
}

function split(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (blank(lines[i])) {
      i++;
      continue;
    }
    const end = endOf(lines, i);
    blocks.push(lines.slice(i, end));
    i = end;
  }
  return blocks;
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const node = element(/\d/.test(first[2]) ? "ol" : "ul");
  if (node.tagName === "OL") node.start = Number.parseInt(first[2], 10);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length < first[1].length + 2 && !RULE.test(line)) {
      items.push({ width: item[0].length, lines: [line.slice(item[0].length)] });
    } else {
      const { width, lines: own } = items.at(-1);
      own.push(line.slice(Math.min(indent(line), width)));
    }
  }
  for (const item of items) node.append(element("li", split(item.lines).map((block) => build(block, depth + 1))));
  return node;
}

function table(lines) {
  const align = alignments(lines[0], lines[1]);
  const row = (line, tag) => {
    const texts = cells(line);
    return element("tr", align.map((side, column) => {
      const cell = element(tag, inline(texts[column] ?? ""));
      if (side) cell.className = side;
      return cell;
    }));
  };
  const head = element("thead", [row(lines[0], "th")]);
  const node = element("div", [element("table", [head, element("tbody", lines.slice(2).map((line) => row(line, "td")))])]);
  node.className = "table";
  node.tabIndex = 0; // it scrolls by itself where it is wide
  return node;
}

function build(lines, depth) {
  const line = lines[0];
  const opened = fence(line);
  if (opened) {
    const closed = lines.length > 1 && lines.at(-1).trim().startsWith(opened.mark);
    const body = lines.slice(1, closed ? -1 : undefined);
    return codeBlock(body.map((l) => l.slice(Math.min(indent(l), opened.indent))).join("\n"), opened.language);
  }
  const heading = HEADING.exec(line);
  if (heading) {
    let words = (heading[2] ?? "").trimEnd();
    if (/(^|\s)#+$/.test(words.slice(-8))) while (words.endsWith("#")) words = words.slice(0, -1);
    // The page has its own h1 and h2.
    return element(`h${Math.min(6, heading[1].length + 2)}`, inline(words.trim()));
  }
  if (RULE.test(line)) return element("hr");
  if (depth < DEEPEST && QUOTE.test(line)) {
    const inner = split(lines.map((l) => l.replace(QUOTE, "")));
    return element("blockquote", inner.map((block) => build(block, depth + 1)));
  }
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, depth);
  if (alignments(line, lines[1])) return table(lines);
  const node = element("p", inline(lines.map((l) => l.trim()).join("\n")));
  node.dir = "auto";
  return node;
}

// Tabs in front of a line as spaces, but for code, which somebody may copy.
function spaced(lines) {
  let open = null;
  return lines.map((line) => {
    const here = fence(line.trimStart());
    if (here && (!open || line.trim().startsWith(open.mark))) open = open ? null : here;
    return open ? line : line.replace(/^[ \t]+/, (gap) => gap.replaceAll("\t", "    "));
  });
}

const drawn = new WeakMap(); // container -> the source of each of its blocks

export function draw(container, source) {
  const blocks = split(spaced(source.split(/\r\n|\r|\n/)));
  const before = drawn.get(container) ?? [];
  const now = blocks.map((lines) => lines.join("\n"));
  let same = 0;
  while (same < now.length && same < before.length && now[same] === before[same]) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(build(block, 0));
  drawn.set(container, now);
}
