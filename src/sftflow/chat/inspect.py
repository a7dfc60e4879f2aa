"""Looking at rendered rows: as data, and in the terminal."""

from __future__ import annotations

from typing import Any


def token_rows(rendered: Any, tokenizer: Any) -> dict[str, Any]:
    """A rendered row as (id, text, supervised, special) tokens, for the terminal, the pages and --json."""
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    pieces = decode_pieces(tokenizer, [int(i) for i in rendered.ids])
    return {
        "source": rendered.source,
        "tokens": [
            {"id": int(i), "text": piece, "supervised": bool(m), "special": int(i) in special}
            for i, m, piece in zip(rendered.ids, rendered.mask, pieces, strict=True)
        ],
    }


def decode_pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token alone. A token that is only a part of a character shows as its bytes' escapes."""
    out = []
    for i in ids:
        text = tokenizer.decode([i], skip_special_tokens=False)
        if "\ufffd" in text:
            text = tokenizer.convert_ids_to_tokens(i)
        out.append(text)
    return out


def terminal_lines(row: dict[str, Any]) -> Any:
    """A rendered row as rich text: supervised tokens green and underlined, special tokens in brackets of their own
    colour, line ends shown as a sign and kept. Without colour, supervised stretches stand between double brackets."""
    from rich.text import Text

    out = Text()
    inside = False
    for token in row["tokens"]:
        if token["supervised"] != inside:
            out.append("⟦" if token["supervised"] else "⟧", style="dim")
            inside = token["supervised"]
        shown = token["text"].replace("\n", "↵\n")
        style = "bold green" if token["supervised"] else "dim" if token["special"] else ""
        if token["special"]:
            style = f"{style} italic" if token["supervised"] else "cyan"
        out.append(shown, style=style)
    if inside:
        out.append("⟧", style="dim")
    return out
