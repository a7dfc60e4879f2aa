"""How long rows are: quantiles, and histogram bins that all sources share."""

from __future__ import annotations

from typing import Any

import numpy as np

from sftflow.data.audit.rows import Ids

QUANTILES = (5, 25, 50, 75, 95, 99)
# Lengths are counted on the ISO 3 series R10, ten bins a decade: a source of 20 tokens and one of 2,000 both show.
STEPS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)


def spread(values: Ids) -> dict[str, Any]:
    """Of token counts over rows. Quantiles are values that occur (the inverse of the empirical distribution).

    >>> spread(np.arange(1, 101, dtype=np.int32))
    {'min': 1, 'p5': 5, 'p25': 25, 'p50': 50, 'p75': 75, 'p95': 95, 'p99': 99, 'max': 100, 'mean': 50.5}
    """
    values = values if len(values) else np.zeros(1, np.int32)
    at = np.percentile(values, (0, *QUANTILES, 100), method="inverted_cdf")
    names = ("min", *(f"p{q}" for q in QUANTILES), "max")
    found = {name: int(value) for name, value in zip(names, at, strict=True)}
    return {**found, "mean": round(float(values.mean(dtype=np.float64)), 2)}


def length_edges(lengths: Ids) -> tuple[int, ...]:
    """Bin edges around all lengths, one set for every source, so that their histograms share an axis.

    >>> length_edges(np.array([11, 47]))
    (10, 13, 16, 20, 25, 32, 40, 50)
    """
    if not len(lengths):
        return (1, 2)
    low, high = max(1, int(lengths.min())), max(1, int(lengths.max()))
    every = sorted({int(step * 10**decade + 0.5) for decade in range(len(str(high)) + 1) for step in STEPS})
    begin = max(i for i, edge in enumerate(every) if edge <= low)
    end = min(i for i, edge in enumerate(every) if edge > high)
    return tuple(every[begin : end + 1])
