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

# Control characters (HTML forbids them, a terminal paste may obey them) and lone surrogates (not encodable as UTF-8).
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# What a reader cannot see: said by its code point, so that two tokens that look alike can be told apart.
_INVISIBLE = re.compile(r"[\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")

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
.tokens { padding: .6rem .75rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  font: .8125rem/1.85 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: .5rem 0; }
.t { padding: 1px 2px; margin-right: 1px; border: 1px solid var(--line); border-radius: 3px; unicode-bidi: isolate;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.t.s { background: var(--sup); border-color: var(--sup); border-bottom: 2px solid var(--sup-line); }
.t.x { border: 1px solid var(--special); color: var(--special); }
.t.s.x { border-bottom: 2px solid var(--special); }
.t i { font-style: normal; color: var(--soft); opacity: .75; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0; font-size: .8125rem;
  color: var(--soft); }
@media print { body { font-size: 10pt; max-width: none; padding: 0; background: #fff; }
  .tokens { font-size: 7.5pt; line-height: 1.6; } h2, h3 { break-after: avoid; } }
"""

_INSPECT_CSS = """
section { margin-top: 1.75rem; } section p { margin: .15rem 0; }
.refused { padding: .6rem .75rem; background: var(--warn); border-left: 4px solid var(--warn-line); }
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


def _bytes(text: str) -> str:
    """'hi' -> '68 69'. A token that holds part of a character decodes to U+FFFD: its bytes are not known here."""
    if "\ufffd" in text:
        return "part of a character"
    data = text.encode("utf-8", "surrogatepass")
    shown = data[:48].hex(" ")  # a title longer than this is no longer read
    return f"{len(data)} bytes: {shown}{' …' if len(data) > 48 else ''}" if data else "0 bytes"


def visible(text: str) -> str:
    """A token's text as HTML with its whitespace drawn.

    >>> visible(" a\\n")
    '<i>·</i>a<i>↵</i><br>'
    """
    if not text:
        return "<i>∅</i>"
    out = esc(text.replace("\r\n", "␍\n").replace("\r", "␍"))
    out = _INVISIBLE.sub(lambda m: f"<i>U+{ord(m.group()):04X}</i>", out)
    return out.replace(" ", "<i>·</i>").replace("\t", "<i>⇥</i>").replace("\n", "<i>↵</i><br>")


def token_box(token: Mapping[str, Any]) -> str:
    """{"text": "hi", "id": 7, "supervised": True, "special": False} -> '<span class="t s" title="id 7 · …">hi</span>'

    A line break ends the box's line but stays outside it, so that the box is not torn in two.
    """
    text, supervised, special = str(token["text"]), bool(token.get("supervised")), bool(token.get("special"))
    kinds = "t" + (" s" if supervised else "") + (" x" if special else "")
    said = f"id {token['id']} · {_bytes(text)} · {'supervised' if supervised else 'not supervised'}"
    shown, breaks = visible(text), ""
    while shown.endswith("<br>"):
        shown, breaks = shown.removesuffix("<br>"), "<br>"
    return f'<span class="{kinds}" title="{esc(said + (" · special" if special else ""))}">{shown}</span>{breaks}'


def token_boxes(tokens: Sequence[Mapping[str, Any]]) -> str:
    """One block of boxes. <wbr> between them: without spaces a browser would find no place to break the line."""
    return f'<div class="tokens">{"<wbr>".join(token_box(t) for t in tokens)}</div>'


def legend() -> str:
    return (
        '<div class="legend"><span><span class="t s">text</span> supervised: the loss is taken here</span>'
        '<span><span class="t">text</span> only read</span>'
        '<span><span class="t x">&lt;|token|&gt;</span> special token</span>'
        "<span>· space, ↵ line break, ⇥ tab</span><span>hover: id and bytes</span></div>"
    )


def _row(index: int, row: Mapping[str, Any]) -> str:
    head = f"<section><h2>{esc(row.get('source') or f'row {index + 1}')}</h2>"
    if "refused" in row:
        return f'{head}<p class="refused"><b>Refused:</b> {esc(row["refused"])}</p></section>'
    tokens = row.get("tokens") or []
    supervised = sum(bool(t.get("supervised")) for t in tokens)
    share = f" ({100 * supervised / len(tokens):.0f}%)" if tokens else ""
    return (
        f'{head}<p class="soft small">{len(tokens):,} tokens, {supervised:,} supervised{share}</p>'
        f"{token_boxes(tokens)}</section>"
    )


def render_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """One page of rows {"source", "tokens": [{"text", "id", "supervised", "special"}]} or {"source", "refused"}."""
    refused = sum("refused" in r for r in rows)
    tokens = [t for r in rows for t in r.get("tokens") or []]
    supervised = sum(bool(t.get("supervised")) for t in tokens)
    one = "conversation" if len(rows) == 1 else "conversations"
    summary = f"{len(rows):,} {one}, {len(tokens):,} tokens, {supervised:,} supervised, {refused:,} refused."
    head = f'<header><h1>What is trained on</h1><p class="soft">{summary}</p>{legend()}</header>'
    body = "\n".join([head, *(_row(i, row) for i, row in enumerate(rows))])
    return page("What is trained on", PAGE_CSS + _INSPECT_CSS, body)
