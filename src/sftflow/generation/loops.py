"""Whether a reply goes round in a loop, so that its next tokens can be guessed, and read all at once."""

from __future__ import annotations

from collections import deque

import numpy as np

ROUNDS, TOKENS = 3, 32
"""a loop: so many rounds of one period, the last one whole, and at least so many tokens"""
LONGEST = 96
"""tokens of the longest period that is looked for"""
FIRST, MOST = 64, 512
"""tokens that are guessed: at first, and at most; twice as many each time that all were right"""

_P = np.arange(1, LONGEST + 1)
NEEDED = np.maximum((ROUNDS - 1) * _P, TOKENS - _P)
"""[p - 1]: so many tokens in a row are the one p before it, where it is a loop of p"""


class LoopWatch:
    """Follows the tokens of one reply.

    >>> watch = LoopWatch()
    >>> for token in [5, *[1, 2, 3] * 11]: watch.add(token)
    >>> watch.guess(7)
    [1, 2, 3, 1, 2, 3, 1]
    """

    def __init__(self) -> None:
        self._last: deque[int] = deque(maxlen=LONGEST)  # the newest in front
        self._same = np.zeros(LONGEST, np.int64)  # [p - 1]: so many tokens in a row were the one p before
        self._ahead = FIRST

    def add(self, token: int) -> None:
        known = len(self._last)
        same = np.fromiter(self._last, np.int64, known) == token
        self._same[:known] = (self._same[:known] + 1) * same
        self._last.appendleft(token)

    def guess(self, room: int) -> list[int]:
        """The tokens that come next if the loop goes on, at most `room`; [] where there is none."""
        found = np.flatnonzero(self._same >= NEEDED)
        if not len(found):
            self._ahead = FIRST
            return []
        period = list(self._last)[: int(found[0]) + 1][::-1]
        n = min(self._ahead, room)
        self._ahead = min(2 * self._ahead, MOST)
        return (period * (n // len(period) + 1))[:n]
