"""Muon whose iteration runs in the precision that the machine multiplies natively."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sftflow.runtime import has_native_bf16


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) with the same state and settings.

    torch runs the Newton-Schulz iteration in bf16 everywhere. A CPU without bf16 products does that at a fiftieth of
    its fp32 speed, and the iteration then takes nearly all of a step: here it runs in fp32 on such machines.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            a_b_c, steps, eps = group["ns_coefficients"], group["ns_steps"], group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                dtype = torch.bfloat16 if has_native_bf16(p.device.type) else torch.float32
                update = orthogonalised(update.to(dtype), a_b_c, steps, eps)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


def orthogonalised(matrix: torch.Tensor, a_b_c: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """U S' V^T of a matrix U S V^T, S' near 1: X <- a X + (b A + c A A) X with A = X X^T, `steps` times.

    The matrix is divided by its norm first, and iterated on the side where A is the smaller one.
    """
    a, b, c = a_b_c
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
