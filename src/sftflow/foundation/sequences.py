"""What two sequences have in common."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def common_prefix(a: Sequence[Any] | NDArray[np.int64], b: Sequence[Any] | NDArray[np.int64]) -> int:
    """How many items two sequences of the same type (ids, or the characters of a text) have in common at the start.

    >>> common_prefix("prompt", "prose"), common_prefix([5, 6], [5, 6, 7])
    (3, 2)
    """
    n = min(len(a), len(b))
    if isinstance(a, np.ndarray):
        differ = np.flatnonzero(a[:n] != b[:n])
        return int(differ[0]) if len(differ) else n
    return bisect.bisect_left(range(1, n + 1), True, key=lambda size: a[:size] != b[:size])
