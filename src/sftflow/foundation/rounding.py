"""Rounding weights to bf16 without losing small updates.

bf16 keeps 8 bits of a weight. A fine-tuning step of 1e-5 on a weight of 0.05 is a twentieth of the distance to the
next bf16 number: rounded to nearest, the weight that the products see does not move, and a base published in bf16
stands exactly on such numbers, so at first none of them moves. Here every weight has a threshold of its own, spread
evenly over [0, 1): it is rounded up where its remainder exceeds one minus that. One weight in twenty then moves by a
whole step, which is on average what fp32 would have done. A weight that is a bf16 number stays what it is.

As stochastic rounding (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision"), but with fixed
thresholds, so a resumed run sees the same weights and no random numbers are spent. The thresholds are the additive
recurrence of two dimensions (Roberts 2018, "The Unreasonable Effectiveness of Quasirandom Sequences").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROW_STEP, COLUMN_STEP = 49472, 37345
"""2^16 / g and 2^16 / g^2, where g^3 = g + 1"""
BLOCK = 1 << 20
"""weights rounded at a time, so that what lies between stays in the cache"""


def round_bf16(weight: torch.Tensor, out: torch.Tensor | None = None, *, first_row: int = 0) -> torch.Tensor:
    """The fp32 tensor as bf16, into `out` where given; NaN and infinity stay what they are.

    first_row: the number of its first row in the whole weight, where it is a part of one.

    >>> import torch
    >>> w = torch.full((100, 100), 1 + 0.25 * 2**-7)  # a quarter of the way to the next bf16 number
    >>> round((round_bf16(w) > 1).float().mean().item(), 2)
    0.25
    """
    import torch

    if out is None:
        out = torch.empty_like(weight, dtype=torch.bfloat16)
    if not weight.numel():
        return out
    flat = weight.detach().contiguous().view(-1, weight.shape[-1] if weight.ndim > 1 else weight.numel())
    target = out.view(flat.shape)
    columns = torch.arange(flat.shape[1], dtype=torch.int32, device=weight.device) * COLUMN_STEP
    rows = max(1, BLOCK // flat.shape[1])
    before = first_row * (weight.shape[1:-1].numel() if weight.ndim > 2 else 1)
    for start in range(0, len(flat), rows):
        part = flat[start : start + rows]
        at = (
            torch.arange(before + start, before + start + len(part), dtype=torch.int32, device=weight.device) * ROW_STEP
        )
        bits = (at[:, None] + columns).bitwise_and_(0xFFFF).add_(part.view(torch.int32)).bitwise_and_(-0x10000)
        rounded = bits.view(torch.float32)
        target[start : start + rows] = torch.where(part.isfinite(), rounded, part)
    return out
