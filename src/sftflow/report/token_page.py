"""Token boxes in HTML: every token of a rendered conversation, and which of them are trained on.

`token_boxes` is the one drawing of a mask; `render --html` and the comparison report both call it. `page` and `esc`
are the one place where a page of ours gets its policy and its strings their escaping.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sftflow.report.token_view import UNSEEN, Piece, code_point, pieces_of_row, raw_bytes, turns_of_row

# Control characters (HTML forbids them, a terminal paste may obey them) and lone surrogates (not encodable as UTF-8).
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

PAGE_CSS = """
:root { color-scheme: light dark;
  --bg: #fafaf8; --card: #ffffff; --ink: #1b1e23; --soft: #5a626d; --line: #dddfe3; --faint: #eff0f2;
  --accent: #2457c5; --before: #8a5a12; --good: #14703f; --bad: #b3261e; --warn: #fdf3d9; --warn-line: #c58b00;
  --sup: #d5e3ff; --sup-line: #2457c5; --special: #8a3fb0; }
@media screen and (prefers-color-scheme: dark) { :root {
  --bg: #131519; --card: #1a1d22; --ink: #e4e7eb; --soft: #a0a8b3; --line: #343a43; --faint: #242830;
  --accent: #8db3ff; --before: #e0b060; --good: #63c78f; --bad: #ff8f85; --warn: #2d2612; --warn-line: #b98a1c;
  --sup: #1f3a6d; --sup-line: #8db3ff; --special: #d19bf0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 70rem; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; margin: 0; text-wrap: balance; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; } h3 { font-size: 1rem; }
p { margin: .5rem 0; } a { color: var(--accent); } .soft { color: var(--soft); } .small { font-size: .8125rem; }
.tokens { padding: .5rem .65rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  font: .8125rem/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: .5rem 0;
  min-width: 0; }
.t { padding: 1px 2px; margin-right: 1px; border: 1px solid var(--line); border-radius: 3px; unicode-bidi: isolate;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.t.s { background: var(--sup); border-color: var(--sup); border-bottom: 2px solid var(--sup-line); }
.t.x { border: 1px dashed var(--special); color: var(--special); font-weight: 600; }
.t.s.x { border-bottom: 2px solid var(--sup-line); }
.t i, .legend i { font-style: normal; color: var(--soft); opacity: .8; }
.t.c { margin-left: -2px; border-left: 1px dotted var(--soft); border-radius: 0 3px 3px 0; }
.t small { font-size: .6875rem; color: var(--soft); padding: 0 2px; }
/* What a title says, at the foot of the window at once, and where there is no pointer to wait with. */
.tokens .t:hover, .tokens .t:focus { outline: 2px solid var(--accent); outline-offset: 1px; }
@media screen { .tokens .t:hover::after, .tokens .t:focus::after { content: attr(title); position: fixed; z-index: 8;
  left: 0; right: 0; bottom: 0; padding: .5rem 1rem; background: var(--ink); color: var(--bg); font-weight: 400;
  font-size: .8125rem; line-height: 1.45; white-space: normal; pointer-events: none; }
  .tokens .t:hover::after { z-index: 9; } }
.said { display: grid; grid-template-columns: 8.5rem minmax(0, 1fr); gap: 0 .75rem; align-items: start; }
.said .tokens { margin: 0 0 .4rem; }
.who { padding-top: .5rem; text-align: right; font-size: .8125rem; line-height: 1.4; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.who b { display: block; color: var(--ink); } .who em { font-weight: 400; color: var(--soft); }
.who mark { background: none; color: var(--accent); }
.skip:not(:focus) { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
@media screen and (max-width: 44rem) { .said { grid-template-columns: minmax(0, 1fr); }
  .tokens { padding: .4rem .5rem; }
  .who { display: flex; flex-wrap: wrap; gap: 0 .75rem; text-align: left; padding: .35rem 0 .2rem; }
  .who span { display: flex; gap: 0 .75rem; } .who br { display: none; } }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0; font-size: .8125rem;
  color: var(--soft); }
@media print { body { font-size: 10pt; max-width: none; padding: 0; background: #fff; }
  .tokens { font-size: 7.5pt; line-height: 1.6; } h2, h3 { break-after: avoid; } }
"""

_INSPECT_CSS = """
html { scroll-padding-top: 6rem; }
section { margin-top: 1.5rem; scroll-margin-top: -4rem; } .talk { margin-top: .5rem; }
.key { position: sticky; top: 0; z-index: 3; background: var(--bg); padding: .3rem 0; margin-top: .75rem; }
.key .legend { margin: 0; }
.row { position: sticky; top: 1.75rem; z-index: 2; display: flex; flex-wrap: wrap; gap: 0 .9rem; align-items: baseline;
  background: var(--bg); padding: .3rem 0; border-bottom: 1px solid var(--line); }
.row h2 { font-size: 1rem; min-width: 0; unicode-bidi: isolate; }
.row p { margin: 0; color: var(--soft); font-size: .8125rem; }
.row nav { margin-left: auto; display: flex; font-size: .8125rem; }
.row nav > * { padding: .1rem .55rem; text-decoration: none; } .row nav span { color: var(--line); }
.who { position: sticky; top: 4.2rem; }
.refused { padding: .6rem .75rem; margin: .5rem 0; background: var(--warn); border-left: 4px solid var(--warn-line); }
.index ol { margin: .25rem 0; padding: .5rem .75rem .5rem 2.75rem; columns: 15rem; column-gap: 2.75rem;
  font-size: .8125rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  max-height: 22rem; overflow-y: auto; font-variant-numeric: tabular-nums; }
.index li::marker { color: var(--soft); }
.index a { display: flex; justify-content: space-between; gap: .75rem; text-decoration: none; }
.index a:hover span { text-decoration: underline; } .index span { min-width: 0; }
.index small { color: var(--soft); white-space: nowrap; } .index b { color: var(--bad); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
@media screen and (max-width: 62rem) { .key { position: static; } .row { top: 0; } .who { position: static; }
  html { scroll-padding-top: 4.6rem; } section { scroll-margin-top: -4.2rem; } .row nav > * { padding: .1rem .4rem; }
  .index ol { max-height: 12.8rem; } }
@media print { .key, .row, .who { position: static; } .index, .row nav { display: none; } }
"""


def esc(value: object) -> str:
    """Any value as HTML text or attribute value.

    >>> esc('<b title="x">'), esc(None), esc("bell\\x07")
    ('&lt;b title=&quot;x&quot;&gt;', '', 'bell\ufffd')
    """
    text = "" if value is None else str(value).replace("\r\n", "\n").replace("\r", "\n")
    return html.escape(_FORBIDDEN.sub("\ufffd", text), quote=True)


def page(title: str, css: str, body: str, script: str = "") -> str:
    """One self-contained page under a policy that lets nothing load and only `script`, by its hash, run.

    `css`, `body` and `script` are trusted markup: everything in them that came from data has gone through `esc`.
    """
    # A browser hashes the element's text after turning CRLF into LF; a checkout on Windows must hash the same.
    script = script.replace("\r\n", "\n")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{esc(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def _bytes(token: Mapping[str, Any], pieces: Sequence[Piece]) -> str:
    """'hi' -> '2 bytes: 68 69'. A part of a character also says of which one; rows of older versions only that it
    is one, because their tokens have no bytes."""
    text = str(token["text"])
    data = raw_bytes(token)
    if data is None:
        if "\ufffd" in text:
            return "part of a character"
        data = text.encode("utf-8", "surrogatepass")
    shown = data[:48].hex(" ")  # a title longer than this is no longer read
    said = f"{len(data)} byte{'s' * (len(data) != 1)}" + (f": {shown}{' …' if len(data) > 48 else ''}" if data else "")
    wholes = dict.fromkeys(p.text for p in pieces if p.part)
    for whole in wholes:
        name = code_point(whole) if UNSEEN.match(whole) else whole
        said += f" · part of {name}" if whole else " · not UTF-8"
    return said


def visible(text: str) -> str:
    """A token's text as HTML with its whitespace drawn and what cannot be seen named.

    >>> visible(" a\\n")
    '<i>·</i>a<i>↵</i><br>'
    >>> visible("\\x1b[1m\\u200d")
    '<i>U+001B</i>[1m<i>U+200D</i>'
    """
    if not text:
        return "<i>∅</i>"
    return _DRAWN.sub(_draw, text)


# One pass: what is escaped or named is not looked at again.
_DRAWN = re.compile(
    f"(?P<html>[&<>\"']+)|(?P<blank> +)|(?P<tab>\\t+)|(?P<end>(?:\\r?\\n)+)|(?P<cr>\\r)|{UNSEEN.pattern}"
)


def _draw(m: re.Match[str]) -> str:
    found = m.group()
    match m.lastgroup:
        case "html":
            return html.escape(found, quote=True)
        case "blank":
            return f"<i>{'·' * len(found)}</i>"
        case "tab":
            return f"<i>{'⇥' * len(found)}</i>"
        case "end":  # several line ends are several signs and one break: an empty line says nothing more
            return f"<i>{found.replace(chr(13), '␍').replace(chr(10), '↵')}</i><br>"
        case "cr":
            return "<i>␍</i>"
        case _:
            return f"<i>{code_point(found)}</i>"


def token_box(token: Mapping[str, Any], pieces: Sequence[Piece] | None = None) -> str:
    """{"text": "hi", "id": 7, "supervised": True, "special": False} -> '<span class="t s" title="id 7 · …">hi</span>'

    `pieces` tells the parts of characters in it (`pieces_of_row`): the first part of 🙂 shows as 🙂 and its bytes, the
    others as their bytes. A line break ends the box's line but stays outside it, so that the box is not torn in two.
    """
    if pieces is None:
        [pieces] = pieces_of_row([token])
    supervised, special = bool(token.get("supervised")), bool(token.get("special"))
    kinds = "t" + (" s" if supervised else "") + (" x" if special else "")
    if pieces and pieces[0].part and not pieces[0].first and pieces[0].text:
        kinds += " c"  # goes on with the character that the box before it began
    said = f"id {token['id']} · {_bytes(token, pieces)} · {'supervised' if supervised else 'not supervised'}"
    shown, breaks = "".join(map(_piece, pieces)) or visible(""), ""
    if shown.endswith("<br>"):
        shown, breaks = shown.removesuffix("<br>"), "<br>"
    title = esc(said + (" · special" if special else ""))
    return f'<span class="{kinds}" tabindex="0" title="{title}">{shown}</span>{breaks}'


def _piece(piece: Piece) -> str:
    if not piece.part:
        return visible(piece.text)
    begins = visible(piece.text).removesuffix("<br>") if piece.text and piece.first else ""
    return f"{begins}<small>{piece.part.hex(' ')}</small>"


def token_boxes(tokens: Sequence[Mapping[str, Any]], turns: Sequence[Sequence[Any]] = (), anchor: str = "") -> str:
    """One block of boxes; with `turns` ([first token, role] each), one for every turn with its role and counts beside
    it. `anchor` begins the turns' ids. <wbr> between boxes: without spaces a browser would find no place to break."""
    boxes = [token_box(t, pieces) for t, pieces in zip(tokens, pieces_of_row(tokens), strict=True)]
    parts = turns_of_row({"tokens": tokens, "turns": turns})
    out = []
    for number, (role, start, end) in enumerate(parts):
        block = f'<div class="tokens">{"<wbr>".join(boxes[start:end])}</div>'
        if role is None:
            return block
        own = f' id="{esc(anchor)}t{number + 1}"' if anchor else ""
        later = number + 1 < len(parts)
        # A keyboard goes from box to box; this link, seen only when it is reached, leaves the turn.
        skip = f'<a class="skip" href="#{esc(anchor)}t{number + 2}">next turn</a>' if anchor and later else ""
        name = f"<b>{esc(role)}</b>" if role else "<b><em>template</em></b>"
        counts = f"<span>{_counts(tokens[start:end])}</span>"
        out.append(f'<div class="said"{own}><div class="who">{name} {counts}{skip}</div>{block}</div>')
    return f'<div class="talk">{"".join(out)}</div>'


def _counts(tokens: Sequence[Mapping[str, Any]]) -> str:
    n, supervised = len(tokens), sum(bool(t.get("supervised")) for t in tokens)
    said = f"{n:,} token{'s' * (n != 1)}"
    return f"{said}<br><mark>{supervised:,} supervised</mark>" if supervised else said


def legend() -> str:
    return (
        '<div class="legend"><span><span class="t s">text</span> supervised: the loss is taken here</span>'
        '<span><span class="t">text</span> only read</span>'
        '<span><span class="t x">&lt;|token|&gt;</span> special token</span>'
        "<span><i>·</i> space <i>↵</i> line break <i>⇥</i> tab</span><span>id and bytes: point or tap</span></div>"
    )


def _row(index: int, row: Mapping[str, Any], total: int) -> str:
    name = esc(row.get("source") or f"row {index + 1}")
    here, links = f"r{index + 1}", ""
    if total > 1:
        before = f'<a href="#r{index}" aria-label="previous conversation">↑</a>' if index else "<span>↑</span>"
        after = (
            f'<a href="#r{index + 2}" aria-label="next conversation">↓</a>' if index + 1 < total else "<span>↓</span>"
        )
        links = f'<nav>{before}{after}<a href="#top">index</a></nav>'
    if "refused" in row:
        said, body = "refused", f'<p class="refused"><b>Refused:</b> {esc(row["refused"])}</p>'
    else:
        tokens = row.get("tokens") or []
        supervised = sum(bool(t.get("supervised")) for t in tokens)
        share = f" ({100 * supervised / len(tokens):.0f}%)" if tokens else ""
        said = f"{len(tokens):,} tokens, {supervised:,} supervised{share}"
        body = token_boxes(tokens, row.get("turns") or (), here)
    head = f'<header class="row"><h2>{name}</h2><p>{said}</p>{links}</header>'
    return f'<section id="{here}">{head}{body}</section>'


def _index(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every row of the page with its size, to jump to. The folder that all of them share is left out."""
    if len(rows) < 2:
        return ""
    names = [str(r.get("source") or f"row {i + 1}") for i, r in enumerate(rows)]
    folders = {name.rpartition("/")[0] for name in names}
    cut = len(min(folders)) + 1 if len(folders) == 1 and "" not in folders else 0
    entries = []
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        tokens = row.get("tokens") or []
        supervised = sum(bool(t.get("supervised")) for t in tokens)
        size = "<b>refused</b>" if "refused" in row else f"{supervised:,}/{len(tokens):,}"
        entries.append(f'<li><a href="#r{i + 1}"><span>{esc(name[cut:] or name)}</span> <small>{size}</small></a></li>')
    return (
        '<nav class="index" aria-label="conversations"><p class="soft small">Supervised and all tokens of each:</p>'
        f"<ol>{''.join(entries)}</ol></nav>"
    )


def render_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """One page of rows {"source", "tokens": [{"text", "id", "supervised", "special"}]} or {"source", "refused"}; rows
    may have "turns", and tokens "bytes"."""
    refused = sum("refused" in r for r in rows)
    tokens = [t for r in rows for t in r.get("tokens") or []]
    supervised = sum(bool(t.get("supervised")) for t in tokens)
    one = "conversation" if len(rows) == 1 else "conversations"
    summary = f"{len(rows):,} {one}, {len(tokens):,} tokens, {supervised:,} supervised, {refused:,} refused."
    head = f'<header id="top"><h1>What is trained on</h1><p class="soft">{summary}</p></header>'
    parts = [head, _index(rows), f'<div class="key">{legend()}</div>']
    body = "\n".join([*filter(None, parts), *(_row(i, row, len(rows)) for i, row in enumerate(rows))])
    return page("What is trained on", PAGE_CSS + _INSPECT_CSS, body)
