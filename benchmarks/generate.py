"""Batched generation, ours beside transformers': the same checkpoint, prompts and greedy decoding in fp32.

    python benchmarks/generate.py --model DIR [--items 64] [--tokens 256] [--rounds 3] [--single 64] [--peer-single 16]
                                  [--skip NAME ...]

Prompts: GSM8K test questions in the checkpoint's own chat format. Replies end at the end-of-turn token or after
`--tokens`; that some end early is what continuous refill is for.

    ours 1, 8, 32              `Engine.generate` with so many slots (1: one at a time)
    transformers 1, 8, 32      `model.generate` on batches of so many, sorted by length, padded on the left, sdpa
    transformers continuous    `model.generate_batch`, its continuous batching

Everything runs in one process, one after another; the ways at 32 and the continuous one in rounds whose order turns, so
that a machine that slows down slows all, the others once. items/s is the median; loading and a short warm-up are not
counted. `--single` and `--peer-single` are how many prompts the one-at-a-time ways get, which are slow.

Then the replies are compared token by token: ours at 32 against ours at 1 and against transformers at 1. Where they
differ, the first differing place is named, and whether our engine had reported a near-tie (two logits within 1e-4)
there or before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outside import data_path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
Ids = list[tuple[int, ...]]


def prompts_of(assistant: Any, data: Path, items: int) -> Ids:
    from sftflow.evaluation.options import open_tasks
    from sftflow.evaluation.prompts_for import chat_prompt

    (run,) = open_tasks([f"gsm8k={data}"], items)
    return [chat_prompt(assistant.renderer, item) for item in run.items]


def ours(assistant: Any, slots: int, tokens: int) -> Callable[[Ids], tuple[Ids, list[int]]]:
    from sftflow.generation.engine import Engine
    from sftflow.generation.request import GenerationRequest

    engine = Engine(assistant.model, assistant.renderer, assistant.runtime, max_running=slots)
    engine.decode_mode()  # proves the model and orders the weights, once

    def generate(prompts: Ids) -> tuple[Ids, list[int]]:
        requests = [GenerationRequest(prompt_ids=p, max_new_tokens=tokens, use_python=False) for p in prompts]
        replies = engine.generate(requests)
        return [r.ids for r in replies], [min(r.near_ties, default=-1) for r in replies]

    return generate


def padded(model: Any, stop: list[int], batch: int, tokens: int) -> Callable[[Ids], tuple[Ids, list[int]]]:
    import torch

    def generate(prompts: Ids) -> tuple[Ids, list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        out: Ids = [()] * len(prompts)
        for start in range(0, len(order), batch):
            group = order[start : start + batch]
            longest = max(len(prompts[i]) for i in group)
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros(len(group), longest, dtype=torch.long)
            for row, i in enumerate(group):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, longest - len(prompts[i]) :] = 1
            with torch.inference_mode():
                made = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    do_sample=False,
                    eos_token_id=stop,
                    pad_token_id=stop[0],
                )[:, longest:].tolist()
            for row, i in enumerate(group):
                out[i] = whole(made[row], stop)
        return out, [-1] * len(prompts)

    return generate


def whole(ids: list[int], stop: list[int]) -> tuple[int, ...]:
    """Without the padding behind the end token."""
    ends = [i for i, t in enumerate(ids) if t in stop]
    return tuple(ids[: ends[0] + 1] if ends else ids)


def continuous(model: Any, stop: list[int], tokens: int) -> Callable[[Ids], tuple[Ids, list[int]]]:
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=stop[0], pad_token_id=stop[0], use_cuda_graph=False
    )

    def generate(prompts: Ids) -> tuple[Ids, list[int]]:
        done = model.generate_batch([list(p) for p in prompts], generation_config=config)
        by_prompt = {tuple(o.prompt_ids): o for o in done.values()}
        made = [by_prompt.get(tuple(p)) for p in prompts]
        return [whole(list(o.generated_tokens), stop) if o else () for o in made], [-1] * len(prompts)

    return generate


def compared(name: str, mine: Ids, other: Ids, ties: list[int]) -> None:
    differ = [i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b]
    print(f"{name}: {min(len(mine), len(other)) - len(differ)} of {min(len(mine), len(other))} replies equal")
    for i in differ:
        a, b = mine[i], other[i]
        at = next((k for k in range(min(len(a), len(b))) if a[k] != b[k]), min(len(a), len(b)))
        said = f"near-tie reported at {ties[i]}" if 0 <= ties[i] <= at else "NO near-tie was reported"
        print(f"  reply {i} differs from token {at} on; {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint directory with a chat template")
    parser.add_argument("--data", type=data_path, default="$SFTFLOW_TEST_DATA/gsm8k/test.jsonl")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--single", type=int, default=64, help="prompts for ours, one at a time")
    parser.add_argument("--peer-single", type=int, default=16, help="prompts for theirs, one at a time")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], help="ways to leave out")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    from sftflow.checkpoint import load_assistant

    assistant = load_assistant(args.model)
    assistant.runtime = assistant.engine.runtime  # type: ignore[attr-defined]
    import torch

    peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    prompts = prompts_of(assistant, args.data, args.items)
    stop = assistant.renderer.stop_ids()
    ways: dict[str, Callable[[Ids], tuple[Ids, list[int]]]] = {}
    for n in (1, 8, 32):
        ways[f"ours {n}"] = ours(assistant, n, args.tokens)
        ways[f"transformers {n}"] = padded(peer, stop, n, args.tokens)
    ways["transformers continuous"] = continuous(peer, stop, args.tokens)
    ways = {k: w for k, w in ways.items() if k not in args.skip}
    print(
        f"{len(prompts)} prompts of {statistics.mean(map(len, prompts)):.0f} tokens, {torch.get_num_threads()} threads"
    )
    times: dict[str, list[float]] = {name: [] for name in ways}
    replies: dict[str, tuple[Ids, list[int]]] = {}
    for turn in range(args.rounds):
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn and name.endswith((" 1", " 8")):
                continue  # long enough to be measured once
            alone = {"ours 1": args.single, "transformers 1": args.peer_single}
            given = prompts[: alone.get(name, len(prompts))]
            ways[name](given[:1] if name in alone else given[:2])
            began = time.perf_counter()
            replies[name] = ways[name](given)
            seconds = time.perf_counter() - began
            times[name].append(len(given) / seconds)
            made = sum(map(len, replies[name][0]))
            print(f"  {name:24} {len(given) / seconds:7.3f} items/s  {made / seconds:6.0f} tokens/s", flush=True)
    rate = {name: statistics.median(t) for name, t in times.items() if t}
    print()
    for name, value in rate.items():
        print(f"{name:24} {value:7.3f} items/s  {value / rate.get('ours 32', value):5.2f} of ours at 32")
    for a, b in (("ours 32", "ours 1"), ("ours 32", "transformers 32"), ("ours 32", "transformers continuous")):
        if a in rate and b in rate:
            print(f"{a} / {b}: {rate[a] / rate[b]:.2f}x")
    for other in ("ours 1", "ours 8", "transformers 1", "transformers 32", "transformers continuous"):
        if other in replies and "ours 32" in replies:
            compared(f"ours 32 = {other}", replies["ours 32"][0], replies[other][0], replies["ours 32"][1])
    if args.json:
        args.json.write_text(json.dumps({"items_per_second": times, "prompts": len(prompts)}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
