"""The scores: a forest plot of the differences, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftflow.report import charts
from sftflow.report.page.parts import cells, duo, fold, note
from sftflow.report.pages import esc
from sftflow.report.wording import Data, better_arm, number, outcome, p_value, percent, share


def scores(data: Data, say: dict[str, str]) -> str:
    tasks: Mapping[str, Data] = data.get("tasks") or {}
    if not tasks:
        return ""
    said = (
        "Difference in percentage points with its 95% interval, measured from the better of the two "
        f"{say['before']} arms, so that the gain is never flattered."
    )
    return note(said) + _forest(tasks) + _numbers(data, tasks, say) + _extras(tasks, say)


def _interval(pair: Any, sign: str = "") -> str:
    return f"{percent(pair[0], sign)} to {percent(pair[1], sign)}" if pair else ""


def _verdict(task: Data) -> str:
    change = outcome(task)
    return change if change != "unclear" else f"cannot tell at n={number(task.get('n'))}"


def _forest(tasks: Mapping[str, Data]) -> str:
    scale = charts.forest_scale(_shown(t) for t in tasks.values())
    rows = []
    for name, t in tasks.items():
        interval = _interval(t.get("ci95"), "+")
        told = f"difference {percent(t.get('delta'), '+')}, 95% interval {interval}"
        rows.append(
            f'<tr><th scope="row">{esc(name)}</th><td class="plot">{_drawn(t, scale, told)}</td>'
            f'<td class="delta"><b>{percent(t.get("delta"), "+")}</b><small>{interval}</small></td>'
            f'<td class="verdict {outcome(t)}">{_verdict(t)}</td></tr>'
        )
    drawn = f'<td class="plot">{charts.forest_axis(scale)}</td>'
    axis = f'<tr class="axis" aria-hidden="true"><th></th>{drawn}<td></td><td></td></tr>'
    return f'<table class="forest"><tbody>{"".join(rows)}{axis}</tbody></table>'


def _shown(task: Data) -> list[float]:
    return [*(task.get("ci95") or ()), task.get("delta") or 0.0]


def _drawn(task: Data, scale: tuple[float, float], label: str) -> str:
    if task.get("delta") is None:
        return ""
    return charts.forest(task["delta"], task.get("ci95"), scale, outcome(task), label)


def _numbers(data: Data, tasks: Mapping[str, Data], say: dict[str, str]) -> str:
    before = say["Before"]
    arms = (("base_chat", "chat", f"{before}, chat format"), ("base_plain", "plain", f"{before}, plain text"))
    tested = any(t.get("p_value") is not None for t in tasks.values())
    holm = any(t.get("p_holm") is not None for t in tasks.values())
    powered = any(t.get("detectable") is not None for t in tasks.values())
    rows = []
    for name, t in tasks.items():
        used, wilson = better_arm(t), t.get("wilson") or {}
        columns = [("n", number(t.get("n"))), ("chance", percent(t.get("chance")))]
        for key, arm, title in arms:
            shown = percent(t.get(key))
            if used == arm:
                shown = f'<span class="used">{shown}</span>{_error(t.get("base_stderr"), wilson.get("base"))}'
            columns.append((title, shown))
        columns.append(
            (say["After"], f"<b>{percent(t.get('sft'))}</b>{_error(t.get('sft_stderr'), wilson.get('sft'))}")
        )
        columns.append(
            ("difference", f"<b>{percent(t.get('delta'), '+')}</b><small>{_interval(t.get('ci95'), '+')}</small>")
        )
        if tested:
            adjusted = f"<small>Holm {esc(p_value(t.get('p_holm')))}</small>" if holm else ""
            columns.append(("p", f"{esc(p_value(t.get('p_value')))}{adjusted}"))
        if powered:
            columns.append(("detectable", f"±{percent(t['detectable'])}" if t.get("detectable") is not None else "–"))
        rows.append(
            f'<tr><th scope="row" class="left">{esc(name)}</th>{cells(columns)}'
            f'<td class="verdict left {outcome(t)}" data-label="verdict">{_verdict(t)}</td></tr>'
        )
    names = [name for name, _ in columns]
    head = "".join(f"<th>{name}</th>" for name in names)
    mean, foot = data.get("centred_mean") or {}, ""
    if mean.get("base") is not None and mean.get("sft") is not None:
        gain = number(mean["sft"] - mean["base"], "+.3f")
        foot = (
            '<tfoot><tr><th scope="row" class="left">centred mean</th><td class="wide" colspan="2"></td>'
            f'<td colspan="2" data-label="{before}">{number(mean["base"], ".3f")}</td>'
            f'<td data-label="{say["After"]}">{number(mean["sft"], ".3f")}</td>'
            f'<td data-label="difference">{gain}</td><td class="wide" colspan="{len(names) - 5}"></td></tr></tfoot>'
        )
    said = (
        "In percent, ± one standard error"
        + (", with the 95% Wilson interval of each score" if any(t.get("wilson") for t in tasks.values()) else "")
        + f". ◂ marks the {say['before']} arm that is compared. "
        "Centred: (score − chance) / (1 − chance), averaged over tasks."
        + (
            " p: exact McNemar test over the items that changed (sign flips where scores are fractions)"
            + (", Holm: corrected for the number of tasks" if holm else "")
            + "."
            if tested
            else ""
        )
        + (
            " Detectable: the smallest difference that so many items would have shown four times in five."
            if powered
            else ""
        )
    )
    return (
        f'<table class="cards"><thead><tr><th class="left">task</th>{head}<th class="left">verdict</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody>{foot}</table>{note(said)}"
    )


def _error(error: Any, wilson: Any) -> str:
    """Under a score: its standard error and its interval."""
    told = [] if error is None else [f"± {percent(error)}"]
    told += [_interval(wilson)] if wilson else []
    return "".join(f"<small>{t}</small>" for t in told)


def _extras(tasks: Mapping[str, Data], say: dict[str, str]) -> str:
    """Figures beside the score: other ways to grade, near ties between choices."""
    rows: list[tuple[str, ...]] = []
    for name, t in tasks.items():
        metrics = t.get("metrics") or {}
        sides = [metrics.get(side) or {} for side in ("base", "sft")]
        found: list[tuple[str, ...]] = [
            (esc(str(m).replace("_", " ")), *(_figure(side.get(m)) for side in sides))
            for m in dict.fromkeys(key for side in sides for key in side)
        ]
        for key, what in (("near_ties", "near ties between choices"), ("too_long", "items that did not fit")):
            counts = [(t.get(key) or {}).get(side) for side in ("base", "sft")]
            if any(counts):
                found.append((what, *map(number, counts)))
        rows += [(esc(name),), *found] if found else []
    if not rows:
        return ""
    body = duo(["figure", say["Before"], say["After"]], rows)
    return fold("Other figures of these tasks", body, "stricter and looser grading, near ties")


def _figure(value: Any) -> str:
    """0.5 -> '50.0%', and a count, which is an int, as it is."""
    return share(value) if isinstance(value, float) and 0 <= value <= 1 else number(value, ",.4g")
