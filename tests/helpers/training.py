"""Random examples, and the settings of a short training loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sftflow.foundation.runtime import Runtime
from sftflow.packing.pack import Example
from sftflow.recipe import Schedule, Train

FP32 = Runtime(device="cpu", precision="fp32", reason="test")


BF16 = Runtime(device="cpu", precision="bf16", reason="test")


def examples(count: int, seed: int = 0, longest: int = 40) -> list[Example]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        n = int(rng.integers(2, longest))
        out.append(Example(ids=rng.integers(0, 320, n), mask=rng.integers(0, 2, n).astype(np.int8)))
    return out


def weighted(rows: list[Example], seed: int = 0) -> list[Example]:
    """The rows, of which most count in part, and half a second time with other weights."""
    rng = np.random.default_rng(seed)
    amounts = np.array([0.125, 0.3, 0.7, 1.0])
    both = [*rows, *rows[::2]]
    weights = [np.repeat(rng.choice(amounts, len(e.ids)), rng.integers(1, 9))[: len(e.ids)] * e.mask for e in both]
    return [replace(e, weights=w if n % 5 else None) for n, (e, w) in enumerate(zip(both, weights, strict=True))]


def spec(**changes: Any) -> Train:
    """Settings of six steps."""
    values: dict[str, Any] = dict(
        max_length=64, tokens_per_step=512, micro_tokens=512, steps=6, lr=3e-3, schedule=Schedule(warmup=0.2)
    )
    return Train(**(values | changes))


def shared_rows() -> list[Example]:
    """Rows of which half begin alike."""
    rng = np.random.default_rng(1)
    beginning = rng.integers(0, 320, 12)
    plain = examples(60)
    return plain[:30] + [
        Example(ids=np.concatenate([beginning, e.ids]), mask=np.concatenate([np.zeros(12, np.int8), e.mask]))
        for e in plain[30:]
    ]
