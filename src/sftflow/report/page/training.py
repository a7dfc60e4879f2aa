"""What it was trained on and how it was made: the ledger, the loss, one conversation's mask, the settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sftflow.chat.token_rows import TokenRow
from sftflow.report import charts
from sftflow.report.line_charts import MOST_LINES, Points, ceiling, loss_by_step, scores_by_step, smooth
from sftflow.report.page.parts import cells, duo, fold, note, pairs
from sftflow.report.pages import esc, macros
from sftflow.report.token_page import token_boxes
from sftflow.report.wording import Data, number, percent

MOST_STEPS = 4


def ledger(data: Data) -> str:
    told: Data = data.get("ledger") or {}
    sources: Sequence[Data] = told.get("sources") or []
    if not sources:
        return ""
    keys = ("rows", "repeat", "tokens", "supervised_tokens", "cut", "dropped")
    whole = told.get("supervised_tokens") or sum(s.get("supervised_tokens") or 0 for s in sources)
    rows = []
    for s in sources:
        share = (s.get("supervised_tokens") or 0) / max(s.get("tokens") or 0, 1)
        mix = (s.get("supervised_tokens") or 0) / max(whole, 1)
        columns = [(k.replace("_tokens", ""), number(s.get(k), ",.10g")) for k in keys]
        columns.append(("share of all supervised", f"{100 * mix:.1f}%"))
        label = f"{100 * share:.0f}% of its tokens supervised"
        rows.append(
            f'<tr><th scope="row" class="left">{esc(s.get("name"))}</th>{cells(columns)}'
            f'<td class="plot share">{charts.share_bar(share, label)}<small>{label}</small></td></tr>'
        )
    totals = [(k, number(told.get(k))) for k in ("rows", "tokens", "supervised_tokens", "packed_rows")]
    facts = [f"{value} {k.replace('_', ' ')}" for k, value in totals if told.get(k) is not None]
    if told.get("padding_share") is not None:
        facts.append(f"{percent(told['padding_share'])}% padding")
    names = ("rows", "repeat", "tokens", "supervised", "cut", "dropped", "of all supervised")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<p class="note small">{", ".join(facts)}. Supervised tokens are the ones the loss is taken on. '
        "Cut and dropped count conversations that were too long.</p>"
        f'<table class="cards"><thead><tr><th class="left">source</th>{head}'
        f'<th class="plot left share">supervised share</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


# ---- the loss


def _finite(pairs: Iterable[tuple[Any, Any]]) -> Points:
    return [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]


def _by_source(rows: Sequence[Data]) -> dict[str, Points]:
    """Held-out loss per source, of the sources that have one."""
    names = dict.fromkeys(name for row in rows for name in row.get("sources") or {})
    lines = {n: _finite((row["step"], (row.get("sources") or {}).get(n)) for row in rows) for n in names}
    return {name: points for name, points in lines.items() if points}


def loss(data: Data) -> str:
    told: Data = data.get("loss") or {}
    raw = _finite(zip(told.get("step") or [], told.get("loss") or [], strict=False))
    rows = told.get("validation") or []
    val = _finite((v["step"], v["loss"]) for v in rows)
    if not raw:
        return ""
    line = list(zip((x for x, _ in raw), smooth([y for _, y in raw], len(raw) // 40), strict=True))
    said = f"Training loss {line[0][1]:.2f} → {line[-1][1]:.2f} (smoothed)"
    keys = '<span class="key k-raw">each step</span><span class="key">smoothed</span>'
    sources = _by_source(rows)
    drawn = sources if 2 <= len(sources) <= MOST_LINES else {}
    if val:
        best = min(val, key=lambda v: v[1])
        said += f", validation {val[-1][1]:.2f} at the end, lowest {best[1]:.2f} at step {best[0]:,g}"
        keys += f'<span class="key k-val">validation{" (all, and each source)" if drawn else ""}</span>'
    said += ". Nats per supervised token."
    if len(sources) > MOST_LINES:
        said += f" validation.jsonl has the validation loss of each of the {len(sources)} sources."
    top, highest = ceiling(raw, [val, *drawn.values()])
    if highest > top:
        said += f" The very first steps, up to {highest:.1f}, lie above the drawing."
    curves = loss_by_step(raw, line, val, drawn)
    return f'{note(said)}<figure>{curves}<div class="legend">{keys}</div></figure>{_during(data)}'


def _during(data: Data) -> str:
    """Scores and manners on a sample while it trained: drawn, and in numbers at a few steps."""
    rows: Sequence[Data] = data.get("curves") or []
    if not rows:
        return ""
    lines: dict[str, Points] = {}
    for row in rows:
        stops = {"ends by itself": (row.get("hygiene") or {}).get("stop_rate")}
        for name, value in ({**stops, **(row.get("tasks") or {})}).items():
            if value is not None:
                lines.setdefault(name, []).append((row["step"], value))
    picture = scores_by_step(lines) if lines and len(rows) > 1 else ""
    last = len(rows) - 1
    chosen = [rows[i] for i in sorted({round(k * last / (MOST_STEPS - 1)) for k in range(MOST_STEPS)})]
    body: list[tuple[str, ...]] = []
    for key, title in (("tasks", "score on a sample"), ("hygiene", "replies")):
        names = dict.fromkeys(name for row in chosen for name in row.get(key) or {})
        found = [
            (esc(name.replace("_", " ")), *(percent((row.get(key) or {}).get(name)) for row in chosen))
            for name in names
        ]
        body += [(title,), *found] if found else []
    head = ["in percent, at step", *(number(row.get("step")) for row in chosen)]
    aside = f"{len(chosen)} of {len(rows)} times; evals.jsonl has all" if len(chosen) < len(rows) else ""
    drawn = f"<h3>Tasks while it trained</h3><figure>{picture}</figure>" if picture else ""
    return drawn + fold("While it trained, in numbers", duo(head, body), aside)


# ---- the mask, the making


def mask(data: Data) -> str:
    example: Data = data.get("mask_example") or {}
    tokens: Sequence[Data] = example.get("tokens") or []
    if not tokens:
        return ""
    supervised = sum(bool(t.get("supervised")) for t in tokens)
    said = f"{esc(example.get('source'))}: {len(tokens):,} tokens, {supervised:,} of them supervised."
    return f"{note(said)}{macros('_tokens').legend()}{token_boxes(TokenRow.from_json(example))}"


def made(data: Data) -> str:
    folds = [fold("Recipe", f"<pre>{esc(data['recipe_yaml'])}</pre>")] if data.get("recipe_yaml") else []
    for name, key in (("Settings", "settings"), ("Fingerprints", "fingerprints"), ("Prompt set", "prompt_set")):
        body = pairs(data.get(key) or {})
        if body:
            folds.append(fold(name, body))
    return "".join(folds)
