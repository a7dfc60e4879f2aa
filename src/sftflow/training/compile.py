"""Compiling the decoder layers: one layer's code serves them all, so it takes seconds and not minutes.

Attention stays outside (see `packed_attention`); what gains is everything between the matrix products: norms, rotary
embedding, activations, residual sums and conversions, each of which is else a pass over memory of its own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch


def can_compile(device: str) -> str | None:
    """None where torch.compile has what it needs on this device, else what is missing."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "no triton"
    if device == "cpu":
        compilers = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
        return None if any(c and shutil.which(c) for c in compilers) else "no C++ compiler"
    return f"not for {device}"


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The model's repeated blocks: its largest list of modules, [] where it has none."""
    lists = [m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)
    return [] if blocks is None else list(blocks)
