"""What several sections of the report are built from: table cells, folds, replies side by side, a list to browse.

Every function returns trusted markup; what came from data goes through `esc` here and nowhere later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sftflow.report.pages import esc
from sftflow.report.wording import UNASKED, UNSTOPPED, Data, number

LONG = 700  # characters; a longer reply folds, so that one endless base reply does not bury its neighbours
SHORT = 160  # characters of a question in its entry's one line


def note(text: str) -> str:
    return f'<p class="note small">{text}</p>'


def fact(value: str, label: str, kind: str = "") -> str:
    own = f' class="{kind}"' if kind else ""
    return f'<div class="fact"><b{own}>{value}</b><span>{label}</span></div>'


def fold(name: object, body: str, aside: str = "") -> str:
    more = f' <span class="soft small">{esc(aside)}</span>' if aside else ""
    return f'<details class="fold"><summary>{esc(name)}{more}</summary>{body}</details>'


def tag(text: object, kind: str = "") -> str:
    return f'<span class="tag{" " + kind if kind else ""}">{esc(text)}</span>'


def as_text(value: Any) -> str:
    """'x' -> 'x', and what is no string as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def plural(n: int, noun: str) -> str:
    """(1, 'row') -> '1 row', (1200, 'row') -> '1,200 rows'"""
    return f"{n:,} {noun}{'s' * (n != 1)}"


# ---- tables


def cells(pairs: Iterable[tuple[str, str]]) -> str:
    """Table cells that know their column's name, which a phone shows in place of the header row."""
    return "".join(f'<td data-label="{esc(name)}">{value}</td>' for name, value in pairs)


def duo(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A narrow table that stays one on a phone: a name, and a number a column. A row of one cell is a heading."""
    body = []
    for first, *rest in rows:
        if rest:
            body.append(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in rest)}</tr>')
        else:
            body.append(f'<tr class="group"><th scope="rowgroup" colspan="{len(head)}">{first}</th></tr>')
    top = "".join(f"<th>{name}</th>" for name in head)
    return f'<table class="duo"><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def pairs(values: Mapping[str, Any]) -> str:
    """A list of names and values; {'generation': {'top_p': 1}} is told as 'generation · top_p'."""
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = value.items() if isinstance(value, Mapping) and value else None
        flat += [(f"{key} · {k}", v) for k, v in inner] if inner else [(str(key), value)]
    told = ((k, "–" if v is None else as_text(v)) for k, v in flat)
    body = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in told)
    return f'<dl class="pairs">{body}</dl>' if body else ""


# ---- messages and replies


def message(text: Any) -> str:
    """A message or reply; a very long one folds."""
    if text is None or not str(text).strip():
        return '<div class="empty">(empty)</div>'
    text = str(text)
    if len(text) <= LONG:
        return f'<div class="text">{esc(text)}</div>'
    return (
        f'<details class="long"><summary><span class="text cut">{esc(text[: LONG // 2])}…</span> '
        f'<span class="more">all {len(text):,} characters</span></summary><div class="text">{esc(text)}</div></details>'
    )


def turns(messages: Iterable[Data]) -> str:
    """Only whitelisted roles become a class."""
    out = []
    for m in messages:
        role = "turn user" if m.get("role") == "user" else "turn"
        said = message(as_text(m.get("content")))
        out.append(f'<div class="{role}"><span>{esc(m.get("role"))}</span><div>{said}</div></div>')
    return "".join(out)


def reply(
    title: str, text: Any, finish: Any = None, score: Any = None, flags: Sequence[str] = (), after: bool = False
) -> str:
    """One reply under its title, with what is wrong with its form and its score."""
    faults = [*([UNSTOPPED] if finish == "length" else [UNASKED] if finish == "too_long" else []), *flags]
    badges = "".join(tag(f, "alert") for f in dict.fromkeys(faults))
    if score is not None:
        mark = {0: "✗ wrong", 1: "✓ right"}.get(score, f"score {number(score, '.2f')}")
        badges += tag(mark, "alert" if score == 0 else "")
    head = f"<h4>{title} {badges}</h4>" if title or badges else ""
    return f'<div class="reply{" after" if after else ""}">{head}{message(text)}</div>'


def replies(row: Data, say: dict[str, str]) -> str:
    """Before in chat format, before as plain text, after: side by side where they fit."""
    shown, flags = [], row.get("hygiene") or {}
    for key, arm in (("base", "chat format"), ("base_plain", "plain text")):
        if row.get(key) is not None:
            found = [str(f) for f in flags.get(key) or []]
            title = f"{say['Before']}, {arm}"
            shown.append(reply(title, row[key], row.get(f"{key}_finish"), row.get(f"{key}_score"), found))
    found = [str(f) for f in flags.get("sft") or []]
    shown.append(reply(say["After"], row.get("sft"), row.get("sft_finish"), row.get("sft_score"), found, after=True))
    return f'<div class="replies">{"".join(shown)}</div>'


# ---- a list to browse


def line(text: Any) -> str:
    """The beginning of a text as one line, escaped."""
    words = " ".join(str("" if text is None else text)[: 4 * SHORT].split())
    cut = words if len(words) <= SHORT else words[:SHORT].rstrip() + "…"
    return esc(cut) if cut else '<span class="empty">(empty)</span>'


def entry(
    head: str, tags: str, body: str, *, marks: Iterable[str] = (), kind: str = "", id_: str = "", open_: bool = False
) -> str:
    """One entry of a list: a line that opens. marks: words of ours, by which the list is filtered.

    The id is inside, because a browser opens an entry whose inside is linked to.
    """
    own = f' id="{id_}"' if id_ else ""
    found = f' data-is="{" ".join(marks)}"' + (f' data-kind="{esc(kind)}"' if kind else "")
    return (
        f'<details class="entry"{found}{" open" if open_ else ""}><summary><span class="head">{head}</span>'
        f'<span class="tags">{tags}</span></summary><div class="inside"{own}>{body}</div></details>'
    )


def browse(
    noun: str, entries: Sequence[str], buttons: Sequence[tuple[str, str, int]], kinds: Mapping[str, int] | None = None
) -> str:
    """A list with its filters. The bar is hidden until the script runs: without it the list is whole.

    buttons: (mark, name, how many entries have it)   kinds: of the entries, with their numbers
    """
    pressed = "".join(
        f'<button type="button" data-is="{mark}" aria-pressed="{"false" if mark else "true"}"'
        f"{'' if n else ' disabled'}>{esc(name)} {n}</button>"
        for mark, name, n in [("", "all", len(entries)), *buttons]
    )
    options = "".join(f'<option value="{esc(k)}">{esc(k)} {n}</option>' for k, n in (kinds or {}).items())
    choice = f'<select aria-label="Kind"><option value="">every kind</option>{options}</select>' if options else ""
    return (
        f'<div class="browse" data-noun="{esc(noun)}"><div class="bar" role="search" hidden>'
        f'<input type="search" placeholder="Filter by text" aria-label="Filter {esc(noun)} by text">{choice}{pressed}'
        '<button type="button" class="fold-all" aria-pressed="false">open all</button>'
        '<output aria-live="polite"></output><span class="keys"><kbd>j</kbd> <kbd>k</kbd> move, <kbd>Enter</kbd> opens'
        f"</span></div>{''.join(entries)}</div>"
    )
