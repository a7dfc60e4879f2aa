"""What this machine can do, whether a recipe would run, and whether the maths holds here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence

import numpy as np
import torch

from sftflow.api.mixture import mix
from sftflow.api.shared import RecipeLike, recipe_of, recipe_tasks
from sftflow.foundation.runtime import Runtime, detect
from sftflow.packing.loss import batch_loss
from sftflow.packing.pack import Example, pack_batch
from sftflow.pretraining.pretrain import BaseSpec, build_model


def doctor(
    recipe: RecipeLike | None = None, overrides: Sequence[str] = (), *, math: bool = False
) -> tuple[list[str], bool]:
    """(lines for a person, whether everything is well). Raises RecipeError and its kin for a recipe that would not run.

    overrides: of the recipe, as `--set` has them.   math: prove packing and loss on this machine.
    """
    runtime, good = detect(), True
    lines = [
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("sftflow", "torch", "transformers", "tokenizers")),
        f"device {runtime.device}, precision {runtime.precision} ({runtime.reason})",
    ]
    if recipe is not None:
        made = recipe_of(recipe, None, (), {}, overrides)
        mixture = mix(recipe=made)
        with made.origin.named():
            recipe_tasks(made)
        name = recipe if not isinstance(recipe, dict) else "recipe"
        lines.append(f"{name}: sound; {len(mixture.examples):,} training rows, {len(mixture.held_out):,} held out")
    if math:
        gap, bound = packed_gap(), 1e-5
        good = gap <= bound
        said = f"packed loss equals unpacked full-logits loss: off by {gap:.1e} (bound {bound:.0e})"
        lines.append(f"{'ok  ' if good else 'FAIL'} {said}")
    return lines, good


def packed_gap() -> float:
    """How far the packed, chunked loss is from the unpacked one over all logits, on a tiny random model in fp32: nats
    per supervised token."""
    model = build_model(BaseSpec(params="0.1M"), 320, 0).eval()
    rng = np.random.default_rng(0)
    examples = [
        Example(ids=rng.integers(0, 320, n), mask=rng.integers(0, 2, n).astype(np.int8)) for n in (9, 17, 30, 4)
    ]
    full, n_supervised = 0.0, 0
    with torch.no_grad():
        for e in examples:
            logits = model(input_ids=torch.from_numpy(e.ids)[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(e.ids[1:]), reduction="none")
            full += float((losses * torch.from_numpy(e.mask[1:])).sum())
            n_supervised += int(e.mask[1:].sum())
    packed = batch_loss(model, pack_batch(examples), Runtime(device="cpu", precision="fp32", reason="proof"))
    return abs(float(packed.sum()) - full) / n_supervised
