"""The first screen: what the comparison says in one sentence and a few figures."""

from __future__ import annotations

from sftflow.report.page.parts import fact
from sftflow.report.page.prompts import weak_prompts
from sftflow.report.pages import esc
from sftflow.report.wording import (
    FORGOT,
    Data,
    continued,
    duration,
    forgot,
    headline,
    number,
    outcome,
    size,
    stops_of,
)

ARROW = '<span class="arrow">→</span>'


def verdict(data: Data, say: dict[str, str]) -> str:
    outcomes = [outcome(t) for t in (data.get("tasks") or {}).values()]
    names, parameters = data.get("names") or {}, data.get("parameters")
    over = [data.get("title"), data.get("kind"), f"{names.get('base', '?')} → {names.get('sft', '?')}"]
    over += [size(parameters)] if parameters else []
    seconds = data.get("seconds") or {}
    told = seconds if isinstance(seconds, dict) else {"compare": seconds}  # compare.json has its own alone
    over += [f"{name} {duration(s)}" for name, s in told.items() if s is not None]
    lead = ""
    if continued(data):
        lead = (
            '<p class="lead">The start was already instruction-tuned. This is continued SFT: the question is whether '
            "it got better, not whether it became an assistant.</p>"
        )
    facts = [_mean(data, say), _tasks(outcomes), _stops(data, say), _forgetting(data)]
    return (
        f'<header><p class="over">{" · ".join(esc(o) for o in over if o)}</p>'
        f'<h1 class="headline">{headline(data, outcomes, stops_of(data.get("prompts") or []))}</h1>{lead}'
        f'<div class="facts">{"".join(facts)}</div>{_warning(data)}</header>'
    )


def _mean(data: Data, say: dict[str, str]) -> str:
    mean = data.get("centred_mean") or {}
    if mean.get("base") is None and mean.get("sft") is None:
        return ""
    value = f"{number(mean.get('base'), '.2f')}{ARROW}{number(mean.get('sft'), '.2f')}"
    return fact(value, f"centred mean, {say['before']} → {say['after']} (0 guessing, 1 perfect)")


def _tasks(outcomes: list[str]) -> str:
    if not outcomes:
        return ""
    rest = f"{outcomes.count('worse')} worse, {outcomes.count('unclear')} cannot tell"
    return fact(f"{outcomes.count('better')} of {len(outcomes)}", f"tasks better ({rest})")


def _stops(data: Data, say: dict[str, str]) -> str:
    """Of all replies where these were looked at, else of the fixed prompts."""
    hygiene = data.get("hygiene") or {}
    before, after = ((hygiene.get(side) or {}).get("stop_rate") for side in ("base", "sft"))
    if before is not None and after is not None:
        label = f"of the replies end by themselves, {say['before']} → {say['after']}"
        return fact(f"{number(100 * before, '.0f')}%{ARROW}{number(100 * after, '.0f')}%", label)
    stops = stops_of(data.get("prompts") or [])
    if not stops:
        return ""
    label = f"of {stops[2]} replies end by themselves, {say['before']} → {say['after']}"
    return fact(f"{stops[0]}{ARROW}{stops[1]}", label)


def _forgetting(data: Data) -> str:
    found = forgot(data.get("forgetting"))
    if not found:
        return ""
    change, said = found
    f = data["forgetting"]
    value = f"{number(f['base'], '.2f')}{ARROW}{number(f['sft'], '.2f')}"
    return fact(value, f"bits per byte of plain text: {said}", "worse" if change > FORGOT else "")


def _warning(data: Data) -> str:
    parameters = data.get("parameters")
    who = f"A model of {size(parameters)}" if parameters else "A small model"
    does = "still gives wrong answers to" if parameters and parameters >= 1e9 else "gives weak answers to"
    link = ' <a href="#weak">See them.</a>' if weak_prompts(data) else ""
    return f'<p class="warning"><b>{who} {does} questions unlike those it was trained on.</b>{link}</p>'
