"""How the replies are made, whatever they say: hygiene, loss on held-out conversations, plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftflow.report import charts
from sftflow.report.page.parts import duo, note
from sftflow.report.pages import esc
from sftflow.report.wording import Data, forgot, number, percent, share

RATES = (
    ("stop_rate", "ended by itself"),
    ("limit_rate", "ran to the limit"),
    ("empty_rate", "empty"),
    ("looping_rate", "repeats itself (looping)"),
    ("role_leak_rate", "leaked a control token"),
    ("self_turn_rate", "went on as the user"),
    ("invalid_utf8_rate", "not valid UTF-8"),
    ("distinct_1", "distinct words"),
    ("distinct_2", "distinct pairs of words"),
    ("distinct_3", "distinct triples of words"),
)
CALLS = (("calls", "made"), ("well_formed", "well formed"), ("answered", "answered"))


def hygiene(data: Data, say: dict[str, str]) -> str:
    both = data.get("hygiene") or {}
    sides: list[Data] = [both.get(side) or {} for side in ("base", "sft")]
    if not any(sides):
        return ""
    rows: list[tuple[str, ...]] = [("replies", *(number(s.get("n")) for s in sides))]
    for key, name in RATES:
        if any(s.get(key) is not None for s in sides):
            rows.append((name, *(share(s.get(key)) for s in sides)))
    calls: list[Data] = [s.get("tool_calls") or {} for s in sides]
    if any(calls):
        rows += [("tool calls",), *((name, *(number(c.get(key)) for c in calls)) for key, name in CALLS)]
    lengths: list[Data] = [s.get("length") or {} for s in sides]
    if any(lengths):
        kinds = ("mean", "median", "p90", "max")
        names = {"p90": "90th percentile", "max": "longest"}
        rows.append(("length in tokens",))
        rows += [(names.get(k, k), *(number(x.get(k), ",.4g") for x in lengths)) for k in kinds]
    said = (
        f"Faults of form, counted by rule over each model's replies (of the {say['before']} those in chat format). "
        "They say nothing about what is true."
    )
    return (
        note(said) + f'<div class="beside">{duo(["", say["Before"], say["After"]], rows)}{_lengths(lengths, say)}</div>'
    )


def _lengths(sides: list[Data], say: dict[str, str]) -> str:
    """Both models' lengths under each other, to one scale."""
    drawn = [s for s in sides if s.get("counts") and s.get("edges")]
    if not drawn:
        return ""
    tallest = max(max(s["counts"]) / (sum(s["counts"]) or 1) for s in drawn)
    out = []
    for s, after in zip(sides, (False, True), strict=True):
        name = say["After" if after else "Before"]
        if s in drawn:
            label = f"Lengths of the {name} replies in tokens"
            out.append(f"<h3>{name}</h3>{charts.reply_lengths(s['edges'], s['counts'], tallest, after, label)}")
    return f"<figure>{''.join(out)}<figcaption>share of replies by length in tokens</figcaption></figure>"


def held_out(data: Data, say: dict[str, str]) -> str:
    """Nats per token: all of what is supervised, the end of turn, each role, each source."""
    loss = data.get("held_out_loss") or {}
    if loss.get("not_checked"):
        return note(f"Not measured: {esc(loss['not_checked'])}.")
    sides: list[Data] = [loss.get(side) or {} for side in ("base", "sft")]
    if not any(sides):
        return ""
    rows: list[tuple[str, ...]] = []
    for key, name in (("all", "all that is supervised"), ("end_of_turn", "end of turn")):
        rows += _row(name, [s.get(key) for s in sides])
    for key, title in (("roles", "by role"), ("sources", "by source")):
        groups: list[Mapping[str, Any]] = [s.get(key) or {} for s in sides]
        found = [
            r for name in dict.fromkeys(n for g in groups for n in g) for r in _row(name, [g.get(name) for g in groups])
        ]
        rows += [(title,), *found] if found else []
    if not rows:
        return ""
    n = loss.get("rows")
    said = (
        f"Loss on {f'{number(n)} ' if n is not None else ''}conversations kept out of training, in nats per token; "
        "lower is better. Of a reply's words it says how well they are expected; of the end of turn, whether the "
        "model knows when to stop. User, system and tool words are only read, never trained on."
    )
    return note(said) + duo(["", say["Before"], say["After"], "difference"], rows)


def _row(name: str, values: list[Any]) -> list[tuple[str, ...]]:
    """A row of the table, or none where neither model was measured."""
    if all(v is None for v in values):
        return []
    before, after = values
    change = number(after - before, "+.3f") if before is not None and after is not None else "–"
    return [(esc(name), *(number(v, ".3f") for v in values), change)]


def forgetting(data: Data, say: dict[str, str]) -> str:
    """Bits per byte, so that models with different tokenizers could be compared too."""
    why = (data.get("forgetting") or {}).get("not_checked")
    if why:
        return note(f"Not measured: {esc(why)}.")
    found = forgot(data.get("forgetting"))
    if not found:
        return ""
    change, said = found
    f: Data = data["forgetting"]
    text = f"{esc(f['text'])}, " if f.get("text") else ""
    kept = f"{number(f.get('bytes'))} bytes; " if f.get("bytes") else ""
    row = ("bits per byte", number(f["base"], ".3f"), number(f["sft"], ".3f"), f"{percent(change, '+')}%")
    return (
        note(f"How well it still predicts plain text ({text}{kept}lower is better).")
        + f'<p class="said-plainly">{said[0].upper()}{said[1:]}.</p>'
        + duo(["", say["Before"], say["After"], "change"], [row])
    )
