"""Our training step beside the plain one: packed, isolated, logits at supervised positions only, against a
right-padded batch with transformers' own loss over all logits. Same model, rows, precision, optimizer and rows' order,
in alternating runs; prints real and supervised tokens a second (medians) and their ratio.

    python benchmarks/loop.py [--seconds 20] [--rounds 3]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import numpy as np
import torch

from sftflow.checkpoint import BUILTIN_TINY, prepare, resolve
from sftflow.data.mixture import build_mixture
from sftflow.foundation.runtime import Runtime, detect
from sftflow.packing.loss import batch_loss
from sftflow.packing.pack import Example, best_fit, pack_batch
from sftflow.recipe import parse_recipe

TOKENS = 4096
IGNORE = -100


def padded_batches(examples: list[Example], rows: int) -> list[dict[str, torch.Tensor]]:
    out = []
    for start in range(0, len(examples) - rows + 1, rows):
        group = examples[start : start + rows]
        width = max(len(e.ids) for e in group)
        ids, labels, mask = (np.full((rows, width), fill) for fill in (0, IGNORE, 0))
        for i, e in enumerate(group):
            ids[i, : len(e.ids)] = e.ids
            labels[i, : len(e.ids)] = np.where(e.mask == 1, e.ids, IGNORE)
            mask[i, : len(e.ids)] = 1
        out.append(
            {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}
        )
    return out


def time_padded(
    model: Any, batches: list[dict[str, torch.Tensor]], runtime: Runtime, seconds: float
) -> tuple[float, float]:
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = supervised = 0
    began = time.perf_counter()
    for batch in batches:
        with runtime.autocast():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batch["attention_mask"].sum())
        supervised += int((batch["labels"] != IGNORE).sum())
        if time.perf_counter() - began > seconds:
            break
    spent = time.perf_counter() - began
    return tokens / spent, supervised / spent


def time_ours(model: Any, examples: list[Example], runtime: Runtime, seconds: float) -> tuple[float, float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows = best_fit([len(e.ids) for e in examples], 512)
    order = np.random.default_rng(0).permutation(len(rows))
    per_step = TOKENS // 512
    tokens = supervised = 0
    began = time.perf_counter()
    for start in range(0, len(order) - per_step + 1, per_step):
        batch = pack_batch([examples[i] for r in order[start : start + per_step] for i in rows[r]])
        batch_loss(model, batch, runtime, scale=1 / batch.n_supervised)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.n_tokens
        supervised += batch.n_supervised
        if time.perf_counter() - began > seconds:
            break
    spent = time.perf_counter() - began
    return tokens / spent, supervised / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, _, renderer, _ = prepare(resolve(BUILTIN_TINY))
    sources = [
        {"source": s, "limit": 4000} for s in ("spelling", "spelling_bee", "arithmetic", "concepts", "formatting")
    ]
    mixture = build_mixture(parse_recipe({"mixture": sources}, "benchmark"), renderer)
    order = np.random.default_rng(0).permutation(len(mixture.examples))
    examples = [mixture.examples[i] for i in order]
    runtime = detect()
    mean = sum(len(e.ids) for e in examples) / len(examples)
    batches = padded_batches(examples, max(1, int(TOKENS / mean)))
    results: dict[str, list[tuple[float, float]]] = {"padded, all logits": [], "sftflow, packed": []}
    for _ in range(arguments.rounds):
        results["padded, all logits"].append(time_padded(copy.deepcopy(model), batches, runtime, arguments.seconds))
        results["sftflow, packed"].append(time_ours(copy.deepcopy(model), examples, runtime, arguments.seconds))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {runtime.precision}, {TOKENS} tokens a step\n"
    )
    print("| way | tokens/s | supervised tokens/s |\n|---|---|---|")
    medians = {}
    for name, pairs in results.items():
        medians[name] = statistics.median(p[0] for p in pairs)
        print(f"| {name} | {medians[name]:,.0f} | {statistics.median(p[1] for p in pairs):,.0f} |")
    print(f"\nratio of tokens/s: {medians['sftflow, packed'] / medians['padded, all logits']:.2f}")


if __name__ == "__main__":
    main()
