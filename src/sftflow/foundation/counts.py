"""Large numbers as people write them: 20M."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def count_of(said: Any) -> int:
    """A whole number above 0, of what may end in K, M or G (or B). Raises ValueError, "fact; remedy", for another.

    >>> count_of("20M"), count_of("2.3k"), count_of(4096), count_of(2e7)
    (20000000, 2300, 4096, 20000000)
    """
    found = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([kmgb]?)\s*", str(said), re.ASCII | re.IGNORECASE)
    value = Decimal(found[1]) * FACTORS[found[2].upper()] if found else Decimal(0)
    if value < 1 or value != int(value):
        raise ValueError(f"{said!r} is not a whole number above 0; write for example 20M")
    return int(value)
