"""What this machine can do, whether a recipe would run, and whether the maths holds here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import numpy as np


def examine(recipe: Path | None, math: bool) -> tuple[list[str], bool]:
    """(lines to print, whether everything is well). Raises RecipeError and its kin for a recipe that would not run."""
    from sftflow.runtime import detect

    runtime = detect()
    lines = [
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("sftflow", "torch", "transformers", "tokenizers")),
        f"device {runtime.device}, precision {runtime.precision} ({runtime.reason})",
    ]
    good = True
    if recipe is not None:
        from sftflow.checkpoint import open_renderer, resolve
        from sftflow.data.mixture import build_mixture
        from sftflow.evaluation.options import open_tasks
        from sftflow.recipe import load_recipe

        loaded = load_recipe(recipe)
        mixture = build_mixture(loaded, open_renderer(resolve(loaded.base), loaded.format))
        if loaded.eval:
            open_tasks(loaded.eval.tasks, loaded.eval.limit, allow_code=loaded.eval.allow_code)
        lines.append(f"{recipe}: sound; {len(mixture.examples):,} training rows, {len(mixture.held_out):,} held out")
    if math:
        for name, gap, bound in _proofs():
            holds = gap <= bound
            good &= holds
            lines.append(f"{'ok  ' if holds else 'FAIL'} {name}: off by {gap:.1e} (bound {bound:.0e})")
    return lines, good


def _proofs() -> list[tuple[str, float, float]]:
    """Packed against unpacked, chunked against full loss, on a tiny random model in fp32."""
    import torch

    from sftflow.packing.pack import Example, pack_batch
    from sftflow.pretraining.pretrain import BaseSpec, build_model
    from sftflow.runtime import Runtime
    from sftflow.training.trainer import batch_loss

    model = build_model(BaseSpec(params="0.1M"), 320, 0).eval()
    rng = np.random.default_rng(0)
    examples = [
        Example(ids=rng.integers(0, 320, n), mask=rng.integers(0, 2, n).astype(np.int8)) for n in (9, 17, 30, 4)
    ]
    full = 0.0
    with torch.no_grad():
        for e in examples:
            logits = model(input_ids=torch.from_numpy(e.ids)[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(e.ids[1:]), reduction="none")
            full += float((losses * torch.from_numpy(e.mask[1:])).sum())
    runtime = Runtime(device="cpu", precision="fp32", reason="proof")
    packed = batch_loss(model, pack_batch(examples), runtime)
    n = sum(int(e.mask[1:].sum()) for e in examples)
    return [("packed loss equals unpacked full-logits loss", abs(float(packed.sum()) - full) / n, 1e-5)]
