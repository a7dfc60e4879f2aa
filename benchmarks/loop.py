"""The training step of the shipped base, ours beside the plain one: a right-padded batch with transformers' own loss
over all logits, torch's AdamW and clipping.

    python benchmarks/loop.py [--steps 6] [--rounds 3] [--isa avx2]

    sftflow                the trainer with AdamW: packed, equal beginnings computed once, logits where they are needed
    sftflow, not shared    without the equal beginnings
    sftflow, Muon          with the optimizer of the demo
    plain                  the same rows in the same steps, about 4,096 tokens each, longest first to save padding

Every way starts from the same weights. The first step of each run is not counted. Real and supervised tokens a second;
the computed share is what of the tokens went through the layers, padding included.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import numpy as np
import torch
from record import begin, precision_of

from sftflow.checkpoint import BUILTIN_TINY, prepare, resolve
from sftflow.data.mixture import build_mixture
from sftflow.foundation.runtime import Runtime, detect
from sftflow.packing.pack import Example, best_fit
from sftflow.recipe import Schedule, Train, parse_recipe
from sftflow.training.trainer import Trainer

TOKENS, MAX_LENGTH, IGNORE = 4096, 512, -100
SOURCES = ("spelling", "spelling_bee", "arithmetic", "concepts", "formatting")
OURS: dict[str, dict[str, Any]] = {
    "sftflow": {},
    "sftflow, not shared": {"share_prefixes": False},
    "sftflow, Muon": {"optimizer": "muon"},
}


class FixedPlan:
    """These examples in these steps."""

    def __init__(self, steps: list[list[Example]]) -> None:
        self.total_steps = len(steps)
        self._rows = [[[mine[i] for i in row] for row in best_fit([len(e.ids) for e in mine], MAX_LENGTH)]
                      for mine in steps]  # fmt: skip

    def step_rows(self, step: int) -> list[list[Example]]:
        return self._rows[step]


def steps_of(examples: list[Example], n: int) -> list[list[Example]]:
    """n steps of about TOKENS tokens."""
    out: list[list[Example]] = [[]]
    for example in examples:
        if sum(len(e.ids) for e in out[-1]) + len(example.ids) > TOKENS:
            out.append([])
        out[-1].append(example)
    return out[:n]


def figures(seconds: list[float], cpu: float, real: list[int], supervised: list[int], computed: list[int]) -> Any:
    took = sum(seconds[1:])
    return {
        "tokens_per_second": sum(real[1:]) / took,
        "supervised_per_second": sum(supervised[1:]) / took,
        "cpu_ms_per_token": 1000 * cpu / sum(real[1:]),
        "computed_share": sum(computed) / sum(real),
        "first_step_seconds": seconds[0],
    }


def time_ours(model: Any, steps: list[list[Example]], runtime: Runtime, options: dict[str, Any]) -> Any:
    settings = Train(
        max_length=MAX_LENGTH,
        tokens_per_step=TOKENS,
        lr=1e-5,
        schedule=Schedule(kind="constant", warmup=0.0),
        **{"optimizer": "adamw", **options},
    )
    plan: Any = FixedPlan(steps)
    trainer = Trainer(model, plan, settings, runtime)
    logs = [trainer.train_step()]
    cpu = time.process_time()
    logs += list(trainer)
    cpu = time.process_time() - cpu
    kept = [(x.seconds, x.tokens, x.supervised_tokens, x.computed_tokens) for x in logs]
    seconds, real, supervised, computed = map(list, zip(*kept, strict=True))
    return figures(seconds, cpu, real, supervised, computed)


def time_plain(model: Any, steps: list[list[Example]], runtime: Runtime) -> Any:
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    seconds, computed, cpu = [], [], 0.0
    for number, group in enumerate(steps):
        began, began_cpu = time.perf_counter(), time.process_time()
        width = max(len(e.ids) for e in group)
        ids, labels, mask = (np.full((len(group), width), fill) for fill in (0, IGNORE, 0))
        for i, e in enumerate(group):
            ids[i, : len(e.ids)], mask[i, : len(e.ids)] = e.ids, 1
            labels[i, : len(e.ids)] = np.where(e.mask == 1, e.ids, IGNORE)
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        with runtime.autocast():
            loss = model(**{k: torch.from_numpy(v) for k, v in batch.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        cpu += time.process_time() - began_cpu if number else 0.0
        computed.append(ids.size)
    real = [sum(len(e.ids) for e in group) for group in steps]
    supervised = [sum(int(e.mask[1:].sum()) for e in group) for group in steps]
    return figures(seconds, cpu, real, supervised, computed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="of a way in a round; the first is not counted")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    arguments, record = begin(parser, "loop", small={"steps": 4, "rounds": 3})
    model, _, renderer, _ = prepare(resolve(BUILTIN_TINY))
    mixture = build_mixture(parse_recipe({"mixture": [{"source": s, "limit": 400} for s in SOURCES]}, "loop"), renderer)
    order = np.random.default_rng(0).permutation(len(mixture.examples))
    steps = steps_of([mixture.examples[i] for i in order], arguments.steps)
    runtime = detect(precision_of(arguments.precision))
    record.facts["precision"] = runtime.precision
    for _ in record.turns():
        for way in record.turned([*OURS, "plain"]):
            fresh = copy.deepcopy(model)
            timed = time_plain(fresh, steps, runtime) if way == "plain" else time_ours(fresh, steps, runtime, OURS[way])
            record.add(way, timed)
    record.finish()


if __name__ == "__main__":
    main()
