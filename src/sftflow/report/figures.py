"""Figures and texts as people read them. Every function here is a filter of the templates under its own name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

SHORT = 160
"""characters of a text that is shown as one line"""


def number(x: float | None, spec: str = ",") -> str:
    """
    >>> number(1234), number(-0.5, "+.2f"), number(None), number(float("nan"))
    ('1,234', '−0.50', '–', '–')
    """
    return format(x, spec).replace("-", "−") if x is not None and math.isfinite(x) else "–"


def percent(x: float | None, sign: str = "") -> str:
    """
    >>> percent(0.834), percent(0.834, "+")
    ('83.4', '+83.4')
    """
    return number(None if x is None else 100 * x, f"{sign}.1f")


def share(x: float | None) -> str:
    """
    >>> share(0.834), share(None)
    ('83.4%', '–')
    """
    return "–" if x is None else f"{percent(x)}%"


def plural(n: int, noun: str) -> str:
    """
    >>> plural(1, "row"), plural(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{n:,} {noun}{'s' * (n != 1)}"


def whole_percent(part: float, whole: float = 1.0) -> str:
    """
    >>> whole_percent(1, 3), whole_percent(1, 3000), whole_percent(0, 3)
    ('33%', '<1%', '0%')
    """
    share = part / whole if whole else 0.0
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def interval(pair: Sequence[float], sign: str = "") -> str:
    """
    >>> interval((0.1, 0.25)), interval((-0.1, 0.25), "+")
    ('10.0 to 25.0', '−10.0 to +25.0')
    """
    return f"{percent(pair[0], sign)} to {percent(pair[1], sign)}"


def figure(value: float | None) -> str:
    """A float in 0..1 is a share, all else a number.

    >>> figure(0.5), figure(1), figure(12.25)
    ('50.0%', '1', '12.25')
    """
    return share(value) if isinstance(value, float) and 0 <= value <= 1 else number(value, ",.4g")


def size(n_parameters: float) -> str:
    """
    >>> size(3_400_000)
    '3.4 million parameters'
    """
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if n_parameters >= unit:
            return f"{n_parameters / unit:.3g} {name} parameters"
    return f"{n_parameters:.0f} parameters"


def p_value(p: float) -> str:
    """
    >>> p_value(0.0004), p_value(0.25)
    ('< 0.001', '0.250')
    """
    return "< 0.001" if p < 0.001 else number(p, ".3f")


def duration(seconds: float) -> str:
    """
    >>> duration(140), duration(9), duration(7300)
    ('2 min 20 s', '9 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def as_text(value: Any) -> str:
    """'x' -> 'x', and what is no string as JSON; '–' for None."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def one_line(text: str, most: int = SHORT) -> str:
    """The beginning of a text without its line ends.

    >>> one_line("a\\n b"), len(one_line("c" * 999))
    ('a b', 161)
    """
    words = " ".join(text[: 4 * most].split())
    return words if len(words) <= most else words[:most].rstrip() + "…"


def flattened(values: Mapping[str, Any]) -> dict[str, str]:
    """
    >>> flattened({"a": 1, "generation": {"top_p": 0.9}})
    {'a': '1', 'generation · top_p': '0.9'}
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        inner = {f"{key} · {k}": as_text(v) for k, v in value.items()} if isinstance(value, Mapping) else {}
        flat |= inner or {key: as_text(value)}
    return flat


def side_by_side(
    base: Mapping[str, float | None], sft: Mapping[str, float | None]
) -> list[tuple[str, float | None, float | None]]:
    """
    >>> side_by_side({"a": 1.0, "b": None}, {"a": None, "b": None, "c": 2.0})
    [('a', 1.0, None), ('c', None, 2.0)]
    """
    rows = ((name, base.get(name), sft.get(name)) for name in dict.fromkeys((*base, *sft)))
    return [row for row in rows if row[1:] != (None, None)]
