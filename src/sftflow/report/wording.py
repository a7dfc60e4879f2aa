"""How the report says things: what the models are called, numbers and sizes, a task's outcome, the headline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Data = Mapping[str, Any]
# Better than before is not yet an assistant: below a fifth of the way from guessing to perfect we do not say "yes".
ASSISTANT_AT = 0.2
# Plain text this much worse, in bits per byte, counts as forgetting.
FORGOT = 0.02
UNSTOPPED = "did not stop"
UNASKED = "did not fit the context"
CHANGES = ("improved", "regressed", "same right", "same wrong")


def words(data: Data) -> dict[str, str]:
    """What the two models are called: a start that was already instruction-tuned is no base."""
    if continued(data):
        return {"before": "before", "Before": "Before", "after": "after", "After": "After"}
    return {"before": "base", "Before": "Base", "after": "SFT", "After": "SFT"}


def continued(data: Data) -> bool:
    return str(data.get("kind", "")).startswith("continued")


def number(x: Any, spec: str = ",", empty: str = "–") -> str:
    """Formats numbers only: what is no finite number is shown as a dash."""
    ok = isinstance(x, int | float) and math.isfinite(x)
    return format(x, spec).replace("-", "−") if ok else empty


def percent(x: Any, sign: str = "") -> str:
    """0.834 -> '83.4'"""
    return number(100 * x if isinstance(x, int | float) else None, f"{sign}.1f")


def share(x: Any) -> str:
    """0.834 -> '83.4%'"""
    return "–" if x is None else f"{percent(x)}%"


def size(parameters: float) -> str:
    """3_400_000 -> '3.4 million parameters'"""
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name} parameters"
    return f"{parameters:.0f} parameters"


def p_value(p: Any) -> str:
    """0.0004 -> '< 0.001'"""
    return "< 0.001" if isinstance(p, int | float) and p < 0.001 else number(p, ".3f")


def duration(seconds: float) -> str:
    """140 -> '2 min 20 s'"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def outcome(task: Data) -> str:
    """'better', 'worse' or 'unclear': the comparison's own verdict, else whether the interval excludes 0."""
    said = str(task.get("verdict") or "")
    if said:
        return said if said in ("better", "worse") else "unclear"
    low, high = task.get("ci95") or (0.0, 0.0)
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def headline(data: Data, outcomes: Sequence[str], stops: tuple[int, int, int] | None) -> str:
    better, worse, n = outcomes.count("better"), outcomes.count("worse"), len(outcomes)
    if not n:
        return "No task was graded: judge by the replies below."
    if worse > better:
        return f"No: it got worse on {worse} of {n} tasks."
    if not better:
        return "Cannot tell: no task changed by more than chance would explain."
    if worse:
        return f"Mixed: better on {better} of {n} tasks, worse on {worse}."
    if 2 * better <= n:
        return f"Partly: better on {better} of {n} tasks; on the rest we cannot tell."
    if continued(data):
        return "Yes: it got better on the tasks measured."
    level = (data.get("centred_mean") or {}).get("sft")
    if level is not None and level < ASSISTANT_AT:
        return "Partly: better than the base, but still close to guessing."
    if stops and 2 * stops[1] < stops[2]:
        return "Partly: better scores, but it rarely ends its replies."
    return "Yes: the base became an assistant on the tasks measured."


def stops_of(prompts: Sequence[Data]) -> tuple[int, int, int] | None:
    """How many replies ended by themselves: (before, after, prompts)."""
    told = [p for p in prompts if p.get("base_finish") and p.get("sft_finish")]
    if not told:
        return None
    return (sum(p["base_finish"] == "stop" for p in told), sum(p["sft_finish"] == "stop" for p in told), len(told))


def better_arm(task: Data) -> str:
    """'chat' or 'plain': the arm of the base that its score is taken from."""
    said = task.get("base_arm") or ("plain" if task.get("base_plain") == task.get("base") else "chat")
    return "plain" if said == "plain" else "chat"


def change_of(row: Data, arm: str) -> str:
    """An item's change, as told or from its scores; '' where it was not graded.

    >>> change_of({"base_plain_score": 1.0, "sft_score": 0.0}, "plain")
    'regressed'
    >>> change_of({"base_score": 0.0, "sft_score": 0.0}, "chat")
    'same wrong'
    """
    if row.get("change") in CHANGES:
        return str(row["change"])
    before, after = row.get("base_plain_score" if arm == "plain" else "base_score"), row.get("sft_score")
    if before is None or after is None:
        return ""
    if after != before:
        return "improved" if after > before else "regressed"
    return "same right" if after >= 1 else "same wrong"


def flags_of(prompt: Data, side: str) -> list[str]:
    """What is wrong with the form of a reply to a fixed prompt: the flags told, and whether it had to be cut off."""
    told = [str(f) for f in (prompt.get("hygiene") or {}).get(side) or []]
    return list(dict.fromkeys([*([UNSTOPPED] if prompt.get(f"{side}_finish") == "length" else []), *told]))


def form_change(prompt: Data) -> str:
    """'improved' where the reply has lost a flag and gained none, 'regressed' where it has a new one, else ''.

    >>> form_change({"base_finish": "length", "sft_finish": "stop", "hygiene": {"base": ["looping"], "sft": []}})
    'improved'
    """
    before, after = (set(flags_of(prompt, side)) for side in ("base", "sft"))
    return "regressed" if after - before else "improved" if before - after else ""


def forgot(forgetting: Data | None) -> tuple[float, str] | None:
    """Bits per byte on plain text before and after -> (relative change, in words); more is worse.

    >>> forgot({"base": 2.0, "sft": 2.1})
    (0.05, 'it forgot: 5.0% worse on plain text')
    """
    before, after = ((forgetting or {}).get(side) for side in ("base", "sft"))
    if not before or after is None:
        return None
    change = round(after / before - 1, 4)
    if change > FORGOT:
        return change, f"it forgot: {percent(change)}% worse on plain text"
    if change < -FORGOT:
        return change, f"it forgot nothing: {percent(-change)}% better on plain text"
    return change, f"it kept its plain text: {percent(change, '+')}%, within {percent(FORGOT)}%"
