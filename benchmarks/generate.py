"""Generation, ours beside transformers' and llama.cpp's: the same model, prompts and token limit, greedy.

    python benchmarks/generate.py [--model DIR] [--clients 1 8 32] [--tokens 64] [--rounds 3] [--skip WAY ...]

    sftflow                    one client: `Engine.stream`, prompt after prompt; n: the engine with n slots. fp32
    transformers generate      `model.generate` on n at a time, sorted by length, padded on the left, sdpa. fp32
    transformers continuous    `model.generate_batch`, its continuous batching; at the largest number of clients. fp32
    llama.cpp f32, q8_0        its server's engine in this process (the package xllamacpp), n clients that ask one after
                               another, at its own defaults (keys and values in half precision); the files are written
                               by `sftflow export`'s own writer

The model may be whatever `sftflow` opens: a directory, a .gguf file, builtin:tiny. Prompts are questions of the
built-in tasks in its chat format (of GSM8K with --data), as many as clients, and --single for one client. A reply ends
at the end-of-turn token or after --tokens; with --no-stop only there.

All ways run in one process, one after another, in rounds whose order turns. Loading, and a warm-up of one reply, are
not counted. tokens/s counts generated tokens over all seconds, reading the prompts included; CPU s are those of all
threads, which tell more than seconds where other work runs beside. Between tokens: from one token of a reply to its
next, p50 and p99 over all replies.

Then replies are compared, token by token with ours of one client. Where ours and transformers' differ, a near-tie
(two logits within 1e-4) has to have been reported there or before; else the benchmark exits with 1.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from load import percentile, questions
from outside import data_path
from record import Record, begin

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
Ids = tuple[int, ...]
BLOCK = 32  # tokens, of the cache of their continuous batching


@dataclass
class Made:
    """What one way generated. ids: of each reply, None where it tells none.   tokens: of all replies.   arrivals: of
    each reply, when its tokens came (empty where it is not told).   ties: where ours reported the first near-tie."""

    ids: list[Ids] | None = None
    tokens: int = 0
    arrivals: list[list[float]] = field(default_factory=list)
    ties: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


Way = Callable[[Sequence[Ids]], Made]


def prompts_of(assistant: Any, data: Path | None, n: int) -> list[Ids]:
    if data is None:
        from sftflow.chat.schema import parse_row

        chats = [parse_row({"messages": m}, "benchmark") for m in questions(n)]
        return [assistant.request(chat).prompt_ids for chat in chats]
    from sftflow.evaluation.options import open_tasks
    from sftflow.evaluation.prompts_for import chat_prompt

    (run,) = open_tasks([f"gsm8k={data}"], n)
    return [chat_prompt(assistant.renderer, item) for item in run.items]


def ours(assistant: Any, n: int, tokens: int, stop: bool) -> Way:
    from sftflow.generation.engine import Engine, shared_beginning
    from sftflow.generation.request import GenerationRequest

    engine = Engine(assistant.model, assistant.renderer, assistant.engine.runtime, max_running=n)
    engine.decode_mode()  # proves the model and orders the weights, once

    def request(prompt: Ids) -> GenerationRequest:
        ends = None if stop else frozenset[int]()
        return GenerationRequest(prompt_ids=prompt, max_new_tokens=tokens, use_python=False, stop_ids=ends)

    def generate(prompts: Sequence[Ids]) -> Made:
        made = Made(arrivals=[[] for _ in prompts])
        replies: list[Any] = [None] * len(prompts)
        if n == 1:
            for i, prompt in enumerate(prompts):
                for delta in engine.stream(request(prompt)):
                    made.arrivals[i].append(time.perf_counter())
                    replies[i] = delta.reply or replies[i]
        else:
            longest = max(map(len, prompts)) + tokens
            with engine.scheduler(shared_prefix=shared_beginning(prompts), longest=longest) as scheduler:
                numbers = {scheduler.submit(request(p), streamed=True): i for i, p in enumerate(prompts)}
                while scheduler.busy:
                    for sequence in scheduler.advance():
                        i, delta = numbers[sequence.number], sequence.take()
                        made.arrivals[i].append(time.perf_counter())
                        replies[i] = delta.reply or replies[i]
        made.ids, made.texts = [r.ids for r in replies], [r.text for r in replies]
        made.tokens = sum(map(len, made.ids))
        made.ties = [min(r.near_ties, default=-1) for r in replies]
        return made

    return generate


def padded(model: Any, ends: list[int], n: int, tokens: int, stop: bool) -> Way:
    import torch

    def generate(prompts: Sequence[Ids]) -> Made:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        made = Made(ids=[()] * len(prompts), arrivals=[[] for _ in prompts])
        for start in range(0, len(order), n):
            group = order[start : start + n]
            longest = max(len(prompts[i]) for i in group)
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros(len(group), longest, dtype=torch.long)
            for row, i in enumerate(group):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, longest - len(prompts[i]) :] = 1
            came: list[float] = []

            def stamp(ids: Any, scores: Any, came: list[float] = came, **_: Any) -> Any:
                came.append(time.perf_counter())
                return torch.zeros(len(ids), dtype=torch.bool)

            with torch.inference_mode():
                rows = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    min_new_tokens=None if stop else tokens,
                    do_sample=False,
                    eos_token_id=ends if stop else None,
                    pad_token_id=ends[0],
                    stopping_criteria=[stamp],
                )[:, longest:].tolist()
            for row, i in enumerate(group):
                made.ids[i] = whole(rows[row], ends if stop else [])
                made.arrivals[i] = came[: len(made.ids[i])]
        made.tokens = sum(map(len, made.ids))
        return made

    return generate


def whole(ids: list[int], ends: list[int]) -> Ids:
    """Without the padding behind the end token."""
    at = [i for i, t in enumerate(ids) if t in ends]
    return tuple(ids[: at[0] + 1] if at else ids)


def continuous(model: Any, ends: list[int], n: int, context: int, tokens: int, stop: bool) -> Way:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=ends[0] if stop else -1, pad_token_id=ends[0]
    )
    # Room for n sequences. Left to itself it takes most of the machine's memory for its cache.
    blocks = n * (-(-context // BLOCK) + 1)
    cache = ContinuousBatchingConfig(page_size=BLOCK, num_blocks=blocks, max_batch_tokens=512, use_cuda_graph=False)

    def generate(prompts: Sequence[Ids]) -> Made:
        done = model.generate_batch(
            [list(p) for p in prompts],
            generation_config=config,
            continuous_batching_config=cache,
            record_timestamps=True,
        )
        by_prompt = {tuple(o.prompt_ids): o for o in done.values()}
        outputs = [by_prompt.get(tuple(p)) for p in prompts]
        ids = [whole(list(o.generated_tokens), ends if stop else []) if o else () for o in outputs]
        came = [list(o.timestamps or []) if o else [] for o in outputs]
        return Made(ids=ids, tokens=sum(map(len, ids)), arrivals=came)

    return generate


def llama_cpp(path: Path, context: int, n: int, tokens: int, stop: bool, threads: int) -> Way:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity, params.fit_params = str(path), -1, False
    params.n_ctx, params.n_parallel, params.n_gpu_layers = n * context, n, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    body = {"max_tokens": tokens, "temperature": 0.0, "stream": True, "cache_prompt": False, "ignore_eos": not stop}

    def generate(prompts: Sequence[Ids]) -> Made:
        made = Made(arrivals=[[] for _ in prompts], texts=[""] * len(prompts))
        counts, failed = [0] * len(prompts), []
        waiting = iter(range(len(prompts)))

        def client() -> None:
            for i in waiting:

                def heard(chunk: Any, i: int = i) -> bool:
                    if chunk.get("choices") and chunk["choices"][0]["finish_reason"] is None:
                        made.arrivals[i].append(time.perf_counter())
                        made.texts[i] += chunk["choices"][0]["text"]
                    counts[i] = (chunk.get("usage") or {}).get("completion_tokens", counts[i])
                    failed.extend([chunk["error"]] if "error" in chunk else [])
                    return False

                server.handle_completions({**body, "prompt": list(prompts[i])}, heard)

        clients = [threading.Thread(target=client) for _ in range(min(n, len(prompts)))]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        if failed or not all(counts):
            raise RuntimeError(f"llama.cpp: {failed[:1] or 'a reply without tokens'}")
        made.tokens = sum(counts)
        return made

    return generate


def written(assistant: Any, folder: Path, record: Record) -> dict[str, Path]:
    """The model as GGUF files: {name of the way: file}; none where something for it is missing."""
    from sftflow.exporting import llamacpp
    from sftflow.exporting.to_gguf import plan_of
    from sftflow.foundation.errors import SftflowError
    from sftflow.gguf.writer import write

    out = {}
    for kind in ("f32", "q8_0"):
        path = folder / f"{kind}.gguf"
        try:
            if not llamacpp.available():
                raise SftflowError("llama.cpp", "the package xllamacpp is not installed", "pip install xllamacpp")
            write(plan_of(assistant, kind), path)
            out[f"llama.cpp {kind}"] = path
        except (SftflowError, ModuleNotFoundError) as error:
            record.skip(f"llama.cpp {kind}", str(error))
    return out


def compared(record: Record, name: str, mine: Made, other: Made) -> int:
    """A fact: how many of the replies are equal. Returns how many differ without a near-tie."""
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(mine.ids or [], other.ids or [], strict=False)) if b]
    differ, bad = [(i, a, b) for i, a, b in pairs if a != b], 0
    for i, a, b in differ:
        at = next((k for k in range(min(len(a), len(b))) if a[k] != b[k]), min(len(a), len(b)))
        bad += not 0 <= mine.ties[i] <= at
    said = f", {len(differ) - bad} of the others after a near-tie" if differ else ""
    record.facts[f"replies equal to ours alone, {name}"] = f"{len(pairs) - len(differ)} of {len(pairs)}{said}"
    return bad


def gaps(made: Made) -> dict[str, float]:
    between = [1000 * (b - a) for came in made.arrivals for a, b in pairwise(came)]
    return {"gap_p50_ms": percentile(between, 0.5), "gap_p99_ms": percentile(between, 0.99)} if between else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--data", type=data_path, help="GSM8K's test.jsonl, whose questions are then asked")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--single", type=int, default=4, help="prompts of one client")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--no-stop", action="store_true", help="replies end after --tokens only")
    parser.add_argument("--skip", nargs="*", default=[], help="ways to leave out, by their last word")
    args, record = begin(parser, "generate", small={"clients": [1, 8], "single": 4, "tokens": 48, "rounds": 2})
    import torch

    from sftflow.checkpoint import load_assistant

    assistant = load_assistant(args.model)
    peer = copy.deepcopy(assistant.model).eval()
    peer.set_attn_implementation("sdpa")
    ends, stop = assistant.renderer.stop_ids(), not args.no_stop
    prompts = prompts_of(assistant, args.data, max(*args.clients, args.single))
    kept: dict[tuple[str, int], Made] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {} if "llama.cpp" in args.skip else written(assistant, Path(folder), record)
        context = max(map(len, prompts)) + args.tokens + 8
        ways: dict[tuple[str, int], Way] = {}
        for n in args.clients:
            ways["sftflow", n] = ours(assistant, n, args.tokens, stop)
            ways["transformers generate", n] = padded(peer, ends, n, args.tokens, stop)
            if n == max(args.clients):
                ways["transformers continuous", n] = continuous(peer, ends, n, context, args.tokens, stop)
            for name, path in files.items():
                ways[name, n] = llama_cpp(path, context, n, args.tokens, stop, torch.get_num_threads())
        ways = {(way, n): made for (way, n), made in ways.items() if way.split()[-1] not in args.skip}
        record.facts["prompts"] = f"{sum(map(len, prompts)) / len(prompts):.0f} tokens on average"
        for _, n in dict.fromkeys((None, n) for _, n in ways):
            given = prompts[: args.single if n == 1 else n]
            for way in [w for w, k in ways if k == n]:
                ways[way, n](given[:1])
            for _ in record.turns():
                for way in record.turned([w for w, k in ways if k == n]):
                    began, began_cpu = time.perf_counter(), time.process_time()
                    made = kept[way, n] = ways[way, n](given)
                    took, took_cpu = time.perf_counter() - began, time.process_time() - began_cpu
                    rates = {"tokens_per_second": made.tokens / took, "cpu_seconds": took_cpu}
                    record.add(way, {**rates, **gaps(made)}, clients=n)
    bad = 0
    alone = kept["sftflow", min(args.clients)]
    for (way, n), made in kept.items():
        if made.ids and made is not alone:
            bad += compared(record, f"{way} at {n}", alone, made)
    record.finish()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
