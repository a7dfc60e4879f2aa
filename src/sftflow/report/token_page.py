"""Token boxes in HTML: every token of a rendered row, and which of them are trained on.

`token_boxes` is the one drawing of a mask: the page of `render --html`, the audit, the comparison report and a
notebook's cell have it. No script is needed.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from sftflow.chat.token_rows import Token, TokenRow
from sftflow.report.pages import cell, esc, macros, render
from sftflow.report.token_view import UNSEEN, Piece, code_point, pieces_of_row, turns_of_row, weight_of

MOST_BYTES = 48  # named in a title: a longer one is no longer read


class TurnBoxes(NamedTuple):
    """role: "" for what the template wrote before the first turn, None where the row's turns are not known.
    boxes: one a token.   weight: "", or what the loss of its supervised tokens is multiplied by."""

    role: str | None
    boxes: list[Markup]
    n_supervised: int
    weight: str


def token_page(rows: Sequence[TokenRow]) -> str:
    """One page of rendered and refused rows, with an index where there are several."""
    return render("token_page", rows=rows, names=row_names(rows), token_boxes=token_boxes)


def token_html(rows: Sequence[TokenRow]) -> str:
    """The rows for a notebook's cell: the boxes, and what they mean; of several rows, each under its name."""
    made = macros("_tokens")
    names = row_names(rows) if len(rows) > 1 else ["" for _ in rows]
    shown = (made.tokens_of(row, token_boxes, name=name) for row, name in zip(rows, names, strict=True))
    return cell(Markup("").join([made.legend(), *shown]), "tokens.css")


def token_boxes(row: TokenRow, anchor: str = "") -> Markup:
    """One block of boxes; where the row's turns are known, one for every turn, with its role and counts beside it.
    anchor: begins the ids of the turns; without one they have none."""
    boxes = [token_box(t, pieces) for t, pieces in zip(row.tokens, pieces_of_row(row.tokens), strict=True)]
    turns = [
        TurnBoxes(
            role, boxes[start:end], sum(t.supervised for t in row.tokens[start:end]), weight_of(row.tokens[start:end])
        )
        for role, start, end in turns_of_row(row)
    ]
    return macros("_tokens").token_boxes(turns, anchor)


def row_names(rows: Sequence[TokenRow]) -> list[str]:
    """The names in the index: the folder that all rows share is left out.

    >>> row_names([TokenRow("data/a.jsonl:1"), TokenRow("data/a.jsonl:2")]), row_names([TokenRow("")])
    (['a.jsonl:1', 'a.jsonl:2'], ['row 1'])
    """
    names = [row.source or f"row {i}" for i, row in enumerate(rows, 1)]
    folders = {name.rpartition("/")[0] for name in names}
    cut = len(min(folders)) + 1 if len(folders) == 1 and "" not in folders else 0
    return [name[cut:] or name for name in names]


# ---- one token


def token_box(token: Token, pieces: Sequence[Piece]) -> Markup:
    """One token as markup. A line break ends the box's line but stays outside it, so that the box is not torn in two.

    pieces: the token's, of `pieces_of_row`. The first part of 🙂 shows as 🙂 and its bytes, the others as theirs.

    >>> str(token_box(Token(7, "hi", b"hi", supervised=True), [Piece("hi")]))
    '<span class="t s" tabindex="0" title="id 7 · 2 bytes: 68 69 · supervised">hi</span>'
    """
    goes_on = bool(pieces and pieces[0].part and pieces[0].text and not pieces[0].first)
    marks = (("s", token.supervised), ("x", token.special), ("c", goes_on))
    kinds = " ".join(["t", *(kind for kind, on in marks if on)])
    title = f"id {token.id} · {_bytes(token, pieces)} · {'supervised' if token.supervised else 'not supervised'}"
    title += f", weight {token.weight:g}" if token.weight != 1 else ""
    title += " · special" if token.special else ""
    shown = "".join(map(_piece, pieces)) or visible("")
    inside = shown.removesuffix("<br>")
    box = f'<span class="{kinds}" tabindex="0" title="{esc(title)}">{inside}</span>'
    return Markup(box + shown[len(inside) :])


def _bytes(token: Token, pieces: Sequence[Piece]) -> str:
    """'hi' -> '2 bytes: 68 69'. A part of a character also says of which one."""
    data = token.raw
    said = f"{len(data)} byte{'s' * (len(data) != 1)}"
    if data:
        said += f": {data[:MOST_BYTES].hex(' ')}{' …' if len(data) > MOST_BYTES else ''}"
    for whole in dict.fromkeys(p.text for p in pieces if p.part):
        name = code_point(whole) if UNSEEN.match(whole) else whole
        said += f" · part of {name}" if whole else " · not UTF-8"
    return said


def _piece(piece: Piece) -> str:
    if not piece.part:
        return visible(piece.text)
    begins = visible(piece.text).removesuffix("<br>") if piece.text and piece.first else ""
    return f"{begins}<small>{piece.part.hex(' ')}</small>"


def visible(text: str) -> str:
    """A token's text as HTML with its whitespace drawn and what cannot be seen named.

    >>> visible(" a\\n")
    '<i>·</i>a<i>↵</i><br>'
    >>> visible("\\x1b[1m\\u200d")
    '<i>U+001B</i>[1m<i>U+200D</i>'
    """
    return _DRAWN.sub(_draw, text) if text else "<i>∅</i>"


_SIGNS = str.maketrans({" ": "·", "\t": "⇥", "\n": "↵", "\r": "␍"})
# One pass: what is escaped or named is not looked at again.
_DRAWN = re.compile(rf"[&<>\"']+| +|\t+|(?:\r?\n)+|\r|{UNSEEN.pattern}")


def _draw(m: re.Match[str]) -> str:
    found = m.group()
    if found[0] in "&<>\"'":
        return html.escape(found)
    if found[0] in " \t\n\r":  # several line ends are several signs and one break: an empty line says nothing more
        return f"<i>{found.translate(_SIGNS)}</i>{'<br>' if found[-1] == chr(10) else ''}"
    return f"<i>{code_point(found)}</i>"
