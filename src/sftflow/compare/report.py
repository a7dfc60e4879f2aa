"""The comparison report: one self-contained HTML page, a pure function of what `compare` measured.

    data (JSON-able, see `render_report`) -> sections -> page under a policy that lets nothing load

Model output is hostile text: every string goes through `esc`, and no data is put inside a script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from sftflow.chat.inspect_html import PAGE_CSS, esc, legend, page, token_boxes
from sftflow.compare import charts
from sftflow.compare.words import Data, continued, duration, headline, number, outcome, percent, size, stops_of, words

LONG = 700  # characters; a longer reply folds, so that one endless base reply does not bury its neighbours


def render_report(data: Data) -> str:
    """{"title", "kind", "names", "tasks", "prompts", "ledger" | None, "loss" | None, ...} -> the page as a string.

    Sections whose data is missing are left out, with their link.
    """
    say = words(data)
    built = [
        ("scores", "Scores", _scores(data, say)),
        ("weak", "Weak answers", _weak(data, say)),
        ("prompts", "Fixed prompts", _prompts(data, say)),
        ("ledger", "What it was trained on", _ledger(data)),
        ("loss", "Loss", _loss(data)),
        ("mask", "One training conversation", _mask(data)),
        ("items", "Graded items", _items(data, say)),
        ("made", "How it was made", _made(data)),
    ]
    kept = [(anchor, name, body) for anchor, name, body in built if body]
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in kept)
    parts = [_verdict(data, say), f'<nav aria-label="Sections">{nav}</nav>']
    parts += [f'<section id="{anchor}"><h2>{name}</h2>{body}</section>' for anchor, name, body in kept]
    made = " · ".join(f"{w} {v}" for w, v in (("sftflow", data.get("version")), ("", data.get("generated"))) if v)
    parts.append(f"<footer>{esc(made)}</footer>")
    assets = resources.files("sftflow.compare")
    css, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return page(f"{data.get('title', 'sftflow')}: comparison", PAGE_CSS + css, "\n".join(parts), script)


# ---- 1 · the verdict


def _fact(value: str, label: str) -> str:
    return f'<div class="fact"><b>{value}</b><span>{label}</span></div>'


def _verdict(data: Data, say: dict[str, str]) -> str:
    outcomes = [outcome(t) for t in (data.get("tasks") or {}).values()]
    stops, mean, names = stops_of(data.get("prompts") or []), data.get("centred_mean"), data.get("names") or {}
    arrow, facts = '<span class="arrow">→</span>', []
    if mean:
        value = f"{number(mean.get('base'), '.2f')}{arrow}{number(mean.get('sft'), '.2f')}"
        facts.append(_fact(value, f"centred mean, {say['before']} → {say['after']} (0 guessing, 1 perfect)"))
    if outcomes:
        rest = f"{outcomes.count('worse')} worse, {outcomes.count('unclear')} cannot tell"
        value = f"{outcomes.count('better')} of {len(outcomes)}"
        facts.append(_fact(value, f"tasks better, interval excludes 0 ({rest})"))
    if stops:
        label = f"of {stops[2]} replies end by themselves, {say['before']} → {say['after']}"
        facts.append(_fact(f"{stops[0]}{arrow}{stops[1]}", label))
    over = [data.get("title"), data.get("kind"), f"{names.get('base', '?')} → {names.get('sft', '?')}"]
    parameters = data.get("parameters")
    over += [size(parameters)] if parameters else []
    over += [f"{name} {duration(s)}" for name, s in (data.get("seconds") or {}).items() if s is not None]
    lead = ""
    if continued(data):
        lead = (
            '<p class="lead">The start was already instruction-tuned. This is continued SFT: the question is whether '
            "it got better, not whether it became an assistant.</p>"
        )
    return (
        f'<header><p class="over">{" · ".join(esc(o) for o in over if o)}</p>'
        f'<h1 class="headline">{headline(data, outcomes, stops)}</h1>{lead}'
        f'<div class="facts">{"".join(facts)}</div>{_warning(data)}</header>'
    )


def _warning(data: Data) -> str:
    parameters = data.get("parameters")
    who = f"A model of {size(parameters)}" if parameters else "A small model"
    does = "still gives wrong answers to" if parameters and parameters >= 1e9 else "gives weak answers to"
    link = ' <a href="#weak">See them.</a>' if _weak_prompts(data) else ""
    return f'<p class="warning"><b>{who} {does} questions unlike those it was trained on.</b>{link}</p>'


# ---- 2 · the scores


def _scores(data: Data, say: dict[str, str]) -> str:
    tasks: Mapping[str, Data] = data.get("tasks") or {}
    if not tasks:
        return ""
    low, high = charts.scale(tasks.values())
    axis = charts.forest(None, low, high)
    before = say["Before"]
    arms = (("base_chat", "chat", f"{before}, chat format"), ("base_plain", "plain", f"{before}, plain text"))
    rows = []
    for name, t in tasks.items():
        used = t.get("base_arm") or ("plain" if t.get("base_plain") == t.get("base") else "chat")
        ci = t.get("ci95")
        interval = f"{percent(ci[0], '+')} to {percent(ci[1], '+')}" if ci else ""
        cells = [("n", number(t.get("n"))), ("chance", percent(t.get("chance")))]
        for key, arm, title in arms:
            marked = f'<span class="used">{percent(t.get(key))}</span>' if used == arm else percent(t.get(key))
            cells.append((title, marked + (_error(t.get("base_stderr")) if used == arm else "")))
        cells.append((say["After"], f"<b>{percent(t.get('sft'))}</b>{_error(t.get('sft_stderr'))}"))
        cells.append(("difference", f"<b>{percent(t.get('delta'), '+')}</b><small>{interval}</small>"))
        label = f"difference {percent(t.get('delta'), '+')}, 95% interval {interval}"
        change, p = outcome(t), t.get("p_value")
        verdict = change if change != "unclear" else f"cannot tell at n={number(t.get('n'))}"
        shown = "&lt; 0.001" if p is not None and p < 0.001 else "= " + number(p, ".3f")
        small = "" if p is None else f"<small>p {shown}</small>"
        rows.append(
            f'<tr><th scope="row" class="left">{esc(name)}</th>{_cells(cells)}'
            f'<td class="plot">{charts.forest(t, low, high, label)}<div class="narrow">{axis}</div></td>'
            f'<td class="verdict left {change}" data-label="verdict">{verdict}{small}</td></tr>'
        )
    head = "".join(f"<th>{c}</th>" for c in ("n", "chance", *(a[2] for a in arms), say["After"], "difference"))
    mean, foot = data.get("centred_mean") or {}, ""
    if mean.get("base") is not None and mean.get("sft") is not None:
        gain = number(mean["sft"] - mean["base"], "+.3f")
        foot = (
            '<tfoot><tr><th scope="row" class="left">centred mean</th><td class="wide" colspan="2"></td>'
            f'<td colspan="2" data-label="{say["Before"]}">{number(mean["base"], ".3f")}</td>'
            f'<td data-label="{say["After"]}">{number(mean["sft"], ".3f")}</td>'
            f'<td data-label="difference">{gain}</td><td class="wide" colspan="2"></td></tr></tfoot>'
        )
    return (
        '<p class="note small">Scores in percent, ± one standard error. The difference is measured from the better of '
        f"the two {say['before']} arms, marked ◂, so that the gain is never flattered; beside it its 95% interval. "
        "Centred: (score − chance) / (1 − chance), averaged over tasks.</p>"
        f'<table><thead><tr><th class="left">task</th>{head}<th class="plot">{axis}</th><th class="left">verdict</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody>{foot}</table>"
    )


def _error(x: Any) -> str:
    return "" if x is None else f"<small>± {percent(x)}</small>"


def _cells(cells: Iterable[tuple[str, str]]) -> str:
    """Table cells that know their column's name, which a phone shows in place of the header row."""
    return "".join(f'<td data-label="{esc(name)}">{value}</td>' for name, value in cells)


# ---- 3 · the fixed prompts, and where they fail


def _text(text: Any) -> str:
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


def _reply(title: str, text: Any, finish: Any = None, score: Any = None, after: bool = False) -> str:
    badges = '<span class="tag alert">did not stop</span>' if finish == "length" else ""
    if score is not None:
        mark = {0: "✗ wrong", 1: "✓ right"}.get(score, f"score {number(score, '.2f')}")
        badges += f'<span class="tag{" alert" if score == 0 else ""}">{mark}</span>'
    head = f"<h4>{title} {badges}</h4>" if title or badges else ""
    return f'<div class="reply{" after" if after else ""}">{head}{_text(text)}</div>'


def _replies(p: Data, say: dict[str, str]) -> str:
    """Before in chat format, before as plain text, after: side by side where they fit."""
    shown = []
    for key, arm in (("base", "chat format"), ("base_plain", "plain text")):
        if p.get(key) is not None:
            shown.append(_reply(f"{say['Before']}, {arm}", p[key], p.get(f"{key}_finish"), p.get(f"{key}_score")))
    shown.append(_reply(say["After"], p.get("sft"), p.get("sft_finish"), p.get("sft_score"), after=True))
    return f'<div class="replies">{"".join(shown)}</div>'


def _turns(messages: Iterable[Data]) -> str:
    """Only whitelisted roles become a class."""
    out = []
    for m in messages:
        content = m.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        role = "turn user" if m.get("role") == "user" else "turn"
        out.append(f'<div class="{role}"><span>{esc(m.get("role"))}</span><div>{_text(text)}</div></div>')
    return "".join(out)


def _weak_prompts(data: Data) -> list[tuple[int, Data]]:
    named = set(data.get("weak") or [])
    prompts = enumerate(data.get("prompts") or [])
    return [(i, p) for i, p in prompts if p.get("kind") == "open" or p.get("id") in named]


def _weak(data: Data, say: dict[str, str]) -> str:
    rows = []
    for i, p in _weak_prompts(data):
        asked = [m for m in p.get("messages") or [] if m.get("role") == "user"]
        question = asked[-1].get("content") if asked else p.get("id")
        link = f'<a class="small" href="#p-{i}">side by side</a>'
        rows.append(f"<dt>{_text(question)}</dt><dd>{_reply('', p.get('sft'), p.get('sft_finish'))}{link}</dd>")
    if not rows:
        return ""
    return (
        f'<p class="note">Questions unlike those it was trained on, and what the {say["after"]} model says to them. '
        f'Read these before trusting a reply.</p><div class="weak"><dl>{"".join(rows)}</dl></div>'
    )


def _prompts(data: Data, say: dict[str, str]) -> str:
    prompts: Sequence[Data] = data.get("prompts") or []
    if not prompts:
        return ""
    kinds: dict[str, int] = {}
    cards = []
    for i, p in enumerate(prompts):
        kind = str(p.get("kind") or "other")
        kinds[kind] = kinds.get(kind, 0) + 1
        endless = " data-unstopped" if p.get("sft_finish") == "length" else ""
        cards.append(
            f'<article class="card" id="p-{i}" data-kind="{esc(kind)}"{endless}><header>'
            f'<span class="tag">{esc(kind)}</span><span>{esc(p.get("id"))}</span></header>'
            f"{_turns(p.get('messages') or [])}{_replies(p, say)}</article>"
        )
    buttons = "".join(
        f'<button type="button" data-kind="{esc(value)}" aria-pressed="false">{esc(name)} {n}</button>'
        for value, name, n in [("", "all", len(prompts)), *((k, k, n) for k, n in kinds.items())]
    )
    endless = f"{say['after']} did not stop {sum(p.get('sft_finish') == 'length' for p in prompts)}"
    about = data.get("prompt_set") or {}
    which = f"Prompt set {about.get('name')}, version {about.get('version')}; " if about else ""
    how = (data.get("settings") or {}).get("decoding")
    which += f"{how} decoding; " if how else ""
    return (
        f'<p class="note small">{esc(which)}every prompt and reply is here, none picked.</p>'
        '<div class="bar" id="filter" hidden>'
        '<input type="search" placeholder="Filter by text" aria-label="Filter by text">'
        f'{buttons}<button type="button" data-unstopped aria-pressed="false">{endless}</button>'
        f'<output aria-live="polite"></output></div><div id="cards">{"".join(cards)}</div>'
    )


# ---- 4 · what it was trained on


def _ledger(data: Data) -> str:
    ledger: Data = data.get("ledger") or {}
    sources: Sequence[Data] = ledger.get("sources") or []
    if not sources:
        return ""
    keys = ("rows", "repeat", "tokens", "supervised_tokens", "cut", "dropped")
    whole = ledger.get("supervised_tokens") or sum(s.get("supervised_tokens") or 0 for s in sources)
    rows = []
    for s in sources:
        share = (s.get("supervised_tokens") or 0) / max(s.get("tokens") or 0, 1)
        mix = (s.get("supervised_tokens") or 0) / max(whole, 1)
        cells = [(k.replace("_tokens", ""), number(s.get(k), ",.10g")) for k in keys]
        cells.append(("share of all supervised", f"{100 * mix:.1f}%"))
        label = f"{100 * share:.0f}% of its tokens supervised"
        rows.append(
            f'<tr><th scope="row" class="left">{esc(s.get("name"))}</th>{_cells(cells)}'
            f'<td class="plot share">{charts.bar(share, label)}<small>{label}</small></td></tr>'
        )
    totals = [(k, number(ledger.get(k))) for k in ("rows", "tokens", "supervised_tokens", "packed_rows")]
    facts = [f"{value} {k.replace('_', ' ')}" for k, value in totals if ledger.get(k) is not None]
    if ledger.get("padding_share") is not None:
        facts.append(f"{percent(ledger['padding_share'])}% padding")
    names = ("rows", "repeat", "tokens", "supervised", "cut", "dropped", "of all supervised")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<p class="note small">{", ".join(facts)}. Supervised tokens are the ones the loss is taken on. '
        "Cut and dropped count conversations that were too long.</p>"
        f'<table><thead><tr><th class="left">source</th>{head}<th class="plot left share">supervised share</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


# ---- 5 · the loss


def _finite(pairs: Iterable[tuple[Any, Any]]) -> charts.Points:
    return [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]


def _by_source(rows: Sequence[Data]) -> dict[str, charts.Points]:
    """Held-out loss per source, of the sources that have one."""
    names = dict.fromkeys(name for row in rows for name in row.get("sources") or {})
    lines = {n: _finite((row["step"], (row.get("sources") or {}).get(n)) for row in rows) for n in names}
    return {name: points for name, points in lines.items() if points}


def _loss(data: Data) -> str:
    loss: Data = data.get("loss") or {}
    raw = _finite(zip(loss.get("step") or [], loss.get("loss") or [], strict=False))
    rows = loss.get("validation") or []
    val = _finite((v["step"], v["loss"]) for v in rows)
    if not raw:
        return ""
    smooth = list(zip((x for x, _ in raw), charts.smooth([y for _, y in raw], len(raw) // 40), strict=True))
    said = f"Training loss {smooth[0][1]:.2f} → {smooth[-1][1]:.2f} (smoothed)"
    keys = '<span class="key k-raw">each step</span><span class="key">smoothed</span>'
    sources = _by_source(rows)
    drawn = sources if 2 <= len(sources) <= charts.MOST_SOURCES else {}
    if val:
        best = min(val, key=lambda v: v[1])
        said += f", validation {val[-1][1]:.2f} at the end, lowest {best[1]:.2f} at step {best[0]:,g}"
        keys += f'<span class="key k-val">validation{" (all, and each source)" if drawn else ""}</span>'
    said += ". Nats per supervised token."
    if len(sources) > charts.MOST_SOURCES:
        said += f" validation.jsonl has the validation loss of each of the {len(sources)} sources."
    top, highest = charts.ceiling(raw, [val, *drawn.values()])
    if highest > top:
        said += f" The very first steps, up to {highest:.1f}, lie above the drawing."
    curves = "".join(charts.curve(raw, smooth, val, width, drawn) for width in (900, 340))
    return f'<p class="note small">{said}</p><figure>{curves}<div class="legend">{keys}</div></figure>'


# ---- 6, 7, 8 · the mask, the items, the making


def _mask(data: Data) -> str:
    example: Data = data.get("mask_example") or {}
    tokens: Sequence[Data] = example.get("tokens") or []
    if not tokens:
        return ""
    supervised = sum(bool(t.get("supervised")) for t in tokens)
    said = f"{esc(example.get('source'))}: {len(tokens):,} tokens, {supervised:,} of them supervised."
    return f'<p class="note small">{said}</p>{legend()}{token_boxes(tokens, example.get("turns") or ())}'


def _items(data: Data, say: dict[str, str]) -> str:
    folds = []
    for name, task in (data.get("tasks") or {}).items():
        rows: Sequence[Data] = task.get("rows") or []
        cards = []
        for row in rows:
            answer = row.get("answer")
            answer = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
            turns: list[Data] = [
                {"role": "user", "content": row.get("question")},
                {"role": "expected", "content": answer},
            ]
            head = f"<header><span>{esc(row.get('id'))}</span></header>"
            cards.append(f'<article class="card">{head}{_turns(turns)}{_replies(row, say)}</article>')
        if cards:
            limit = f", at most {task['max_new_tokens']} new tokens" if task.get("max_new_tokens") else ""
            folds.append(_fold(name, "".join(cards), f"{len(rows)} of {number(task.get('n'))} items{limit}"))
    return f'<p class="note small">What the scores rest on, reply by reply.</p>{"".join(folds)}' if folds else ""


def _fold(name: object, body: str, note: str = "") -> str:
    aside = f' <span class="soft small">{esc(note)}</span>' if note else ""
    return f'<details class="fold"><summary>{esc(name)}{aside}</summary>{body}</details>'


def _made(data: Data) -> str:
    folds = [_fold("Recipe", f"<pre>{esc(data['recipe_yaml'])}</pre>")] if data.get("recipe_yaml") else []
    for name, key in (("Settings", "settings"), ("Fingerprints", "fingerprints"), ("Prompt set", "prompt_set")):
        pairs = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in (data.get(key) or {}).items())
        if pairs:
            folds.append(_fold(name, f'<dl class="pairs">{pairs}</dl>'))
    return "".join(folds)
