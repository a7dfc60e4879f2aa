"""A rendered row in the terminal, and what its drawings share: the characters that tokens make up, and the turns.

A token is bytes first: a character may be spread over several of them. `pieces_of_row` tells which characters the
tokens' bytes make up, for the terminal here and for the pages of token_page.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from sftflow.chat.token_rows import Token, TokenRow

# What a reader cannot see, or what would act on the terminal or page that shows it: control characters but for
# line ends and tabs, lone surrogates, odd spaces, zero-width and direction characters, variation selectors, tags.
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f"
    r"\u2028-\u202f\u205f-\u206f\u3000\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb"
    r"\U000e0000-\U000e0fff]"
)


def code_point(character: str) -> str:
    """
    >>> code_point("\\u200b")
    'U+200B'
    """
    return f"U+{ord(character):04X}"


# ---- from bytes to characters


class Piece(NamedTuple):
    """A stretch of one token. Whole characters: `text` alone. Bytes of a character that other tokens hold too: `part`
    the bytes here, `text` that character ("" where the bytes are of none), `first` whether it begins here."""

    text: str
    part: bytes = b""
    first: bool = True


def pieces_of_row(tokens: Sequence[Token]) -> list[list[Piece]]:
    """For each token its pieces; 🙂 over two tokens is Piece("🙂", f0 9f, first) and Piece("🙂", 99 82, not first)."""
    out: list[list[Piece]] = [[] for _ in tokens]
    raw, at = b"".join(t.raw for t in tokens), 0
    owner = [i for i, t in enumerate(tokens) for _ in t.raw]  # the token of every byte
    for character in raw.decode("utf-8", "surrogateescape"):  # a byte of no character is one from U+DC80 on
        known, first = not "\udc80" <= character <= "\udcff", True
        end = at + len(character.encode("utf-8", "surrogateescape"))
        for token, group in itertools.groupby(owner[at:end]):
            part = raw[at : at + len(list(group))]
            at += len(part)
            mine = out[token]
            last = mine[-1] if mine else None
            if known and first and at == end:
                if last and not last.part:
                    mine[-1] = Piece(last.text + character)
                else:
                    mine.append(Piece(character))
            elif not known and last and last.part and not last.text:
                mine[-1] = Piece("", last.part + part)
            else:
                mine.append(Piece(character if known else "", part, first))
            first = False
    return out


def turns_of_row(row: TokenRow) -> list[tuple[str | None, int, int]]:
    """(role, first token, end) of each turn, all tokens covered. The role is "" for what the template wrote before
    the first turn, and None for a whole row whose turns are not known. Turns out of order or without tokens are
    left out.

    >>> turns_of_row(TokenRow("a row", (Token(5, "hi", b"hi", False),) * 3, turns=((1, "user"),)))
    [('', 0, 1), ('user', 1, 3)]
    """
    n = len(row.tokens)
    starts: dict[int, str] = {}
    for start, role in row.turns:
        if max(starts, default=0) <= start < n:
            starts[start] = role  # a second turn at the same token: the first had none
    if not starts:
        return [(None, 0, n)]
    starts = starts if 0 in starts else {0: "", **starts}
    return [(role, start, end) for (start, role), end in zip(starts.items(), [*list(starts)[1:], n], strict=True)]


# ---- the terminal

GUTTER = 11  # cells for the role and the counts
BAR = "┃"
# Signs with a meaning of our own. In a row's text they are written by their code point, so that none is mistaken.
_OURS = re.compile(f"{UNSEEN.pattern[:-1]}↵⇥␣⟦⟧⟨⟩]")


@dataclass(frozen=True, slots=True)
class TerminalRow:
    """A rendered row, drawn for the width and the colours of whichever rich console prints it: turns with their role on
    the left, a bar beside every supervised line.

        user        ⟦<|user_start|>⟧hi⟦<|user_end|>⟧
        4 tokens
        assistant   ⟦<|assistant_start|>⟧
        2/3 sup   ┃ yo⟦<|assistant_end|>⟧

    A line is all supervised or all not: the mask is read off the margin, where no text can imitate it. Line ends of
    the text show as ↵. With colour, supervised text is green too and special tokens are cyan instead of bracketed;
    where one token ends and the next begins shows as a change between plain and underlined.
    """

    row: TokenRow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        colour = console.color_system is not None and not console.no_color
        tokens = self.row.tokens
        margin = 2 if turns_of_row(self.row)[0][0] is None else GUTTER + 3
        width = max(20, options.max_width - margin)
        lines = list(self._lines(console, width, margin, colour))
        yield _key(tokens, colour, any("⟨" in line.plain for line in lines))
        yield from lines

    def _lines(self, console: Console, width: int, margin: int, colour: bool) -> Iterator[Text]:
        for role, start, end in turns_of_row(self.row):
            tokens = self.row.tokens[start:end]
            left = [] if role is None else _gutter(role, tokens)
            lines = [
                (supervised, line)
                for supervised, text in _stretches(tokens, colour)
                for line in text.wrap(console, width)
            ]
            lines += [(False, Text())] * (len(left) - len(lines))  # short turns still say their counts
            for number, (supervised, line) in enumerate(lines):
                out = Text(no_wrap=True, overflow="ignore")
                said = left[number] if number < len(left) else ""
                out.append(said, style="dim" if number or not role else "bold")
                out.append(" " * (margin - 2 - cell_len(said)))
                out.append(f"{BAR} " if supervised else "  ", style="green")
                out.append_text(line)
                out.rstrip()
                yield out


def _key(tokens: Sequence[Token], colour: bool, escapes: bool) -> Text:
    """What the signs mean: those that this row needs."""
    key = Text(no_wrap=True, overflow="crop")
    if any(t.supervised for t in tokens):
        key.append(f"{BAR} ", style="green").append("supervised   ", style="bold green" if colour else "")
    if any(t.special for t in tokens):
        key.append("special" if colour else "⟦special⟧", style="cyan").append("   ")
    key.append("↵ line end", style="dim")
    if escapes:
        key.append("   ⟨unseen character or bytes⟩", style="dim")
    return key


def _gutter(role: str, tokens: Sequence[Token]) -> list[str]:
    name = Text(_OURS.sub("?", role.replace("\n", " ").replace("\t", " ")) or "template")
    name.truncate(GUTTER, overflow="ellipsis")
    n, supervised = len(tokens), sum(t.supervised for t in tokens)
    counts = f"{supervised}/{n} sup" if supervised else f"{n} token{'s' * (n != 1)}"
    weight = weight_of(tokens)
    return [name.plain, counts if len(counts) <= GUTTER else counts.split()[0], *([weight] if weight else [])]


def weight_of(tokens: Sequence[Token]) -> str:
    """What the loss of a turn's supervised tokens is multiplied by: "" where that is 1.

    >>> weight_of([Token(5, "hi", b"hi", True, weight=0.5)]), weight_of([Token(5, "hi", b"hi", True)])
    ('weight 0.5', '')
    """
    weights = sorted({t.weight for t in tokens if t.supervised} or {1.0})
    if weights == [1]:
        return ""
    return f"weight {weights[0]:.3g}" if len(weights) == 1 else "weighted"


def _stretches(tokens: Sequence[Token], colour: bool) -> Iterator[tuple[bool, Text]]:
    """Runs of tokens that are all supervised or all not, as (supervised, text)."""
    for supervised, group in itertools.groupby(tokens, lambda t: t.supervised):
        run, text = list(group), Text()
        for number, (token, pieces) in enumerate(zip(run, pieces_of_row(run), strict=True)):
            style = "bold green" if supervised else ""
            if token.special:
                style = "bold cyan" if supervised else "cyan"
            elif colour and number % 2:
                style += " underline"
            for piece in pieces:
                text.append(_shown(token, piece, colour), style=style)
        text.plain = re.sub(r"\A +| +\Z", lambda m: "␣" * len(m.group()), text.plain)  # nobody could see these
        if text.plain.endswith("\n"):  # the stretch's own end ends the line
            text.right_crop(1)
        yield supervised, text


def _shown(token: Token, piece: Piece, colour: bool) -> str:
    """A piece as it stands in the terminal. A character over several tokens stands at the first of them: reading
    comes before the bytes here, which the page and --json have."""
    if piece.part:
        if not piece.text:
            return f"⟨{piece.part.hex(' ').upper()}⟩"
        return _seen(piece.text) if piece.first else ""
    shown = _seen(piece.text)
    return f"⟦{shown}⟧" if token.special and not colour else shown


def _seen(text: str) -> str:
    text = _OURS.sub(lambda m: f"⟨{code_point(m.group())}⟩", text)
    return text.replace("\t", "⇥").replace("\n", "↵\n")
