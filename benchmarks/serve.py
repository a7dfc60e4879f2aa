"""`sftflow serve` beside `transformers serve`: the same checkpoint, questions and greedy decoding in fp32, as clients
see it: streamed chat replies over HTTP on this machine.

    python benchmarks/serve.py --model DIR [--clients 1 8 32] [--tokens 64] [--rounds 2] [--skip continuous]

    sftflow                    `sftflow serve DIR`
    transformers               `transformers serve DIR`: its replies are computed one after another
    transformers continuous    the same with `--continuous-batching` and a cache of CACHE (on a CPU its own choice is
                               most of the memory, and 5.23 does not answer)

`transformers serve` needs what transformers[serving] names; the extra `dev` of this project has it. One server runs at
a time, in rounds whose order turns. At each number of clients every client asks its questions one after another, 4 in
all where it is alone and else 2 each; a short warm-up is not counted. Printed: generated tokens a second (as each
server counts them), seconds until the first text (median, 95th percentile), /health under that load (median, 99th
percentile, longest), and how many of the replies are equal, letter for letter, to ours at one client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load import (
    HealthProbe,
    Server,
    Streamed,
    client,
    free_port,
    median,
    percentile,
    questions,
    retried,
    serve_command,
    served,
)

WAYS = ("sftflow", "transformers", "transformers continuous")
CACHE = ("--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "512", "--no-cb-use-cuda-graph")


@dataclass
class Measured:
    """One way at one number of clients, over all rounds."""

    rates: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


async def load(server: Server, asked: list[list[dict[str, str]]], clients: int, tokens: int) -> Any:
    """All questions by so many clients: (answers by question, seconds)."""
    body: dict[str, Any] = {"model": server.model, "max_tokens": tokens, "temperature": 0}
    body["stream_options"] = {"include_usage": True}  # theirs ignores the field, and counts unasked
    out: dict[int, Streamed] = {}
    waiting = iter(range(len(asked)))
    async with client(clients) as web:

        async def one() -> None:
            for i in waiting:
                out[i] = (await retried(web, server.url, {**body, "messages": asked[i]}))[-1]

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return out, time.perf_counter() - began


def command(way: str, model: str, port: int) -> list[str]:
    if way == "sftflow":
        return serve_command(model)
    # The console script of the interpreter that runs this.
    script = str(Path(sys.executable).parent / "transformers")
    options = ["--continuous-batching", *CACHE] if way.endswith("continuous") else []
    return [script, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
            "--dtype", "float32", *options]  # fmt: skip


def measure(way: str, args: argparse.Namespace, results: dict[tuple[str, int], Measured]) -> None:
    port, model = (0, None) if way == "sftflow" else (free_port(), args.model)
    with served(command(way, args.model, port), port=port, model=model) as server:
        asyncio.run(load(server, questions(2), 2, 8))
        for n in args.clients:
            asked = questions(4 if n == 1 else 2 * n)
            kept = results[way, n]
            with HealthProbe(server.url) as probe:
                answers, seconds = asyncio.run(load(server, asked, n, args.tokens))
            kept.problems += [a.error for a in answers.values() if a.error]
            good = {i: a for i, a in answers.items() if not a.error}
            kept.rates.append(sum(a.tokens for a in good.values()) / seconds)
            kept.firsts += [a.first for a in good.values() if a.text]
            kept.health += probe.seconds
            kept.texts.update({i: a.text for i, a in good.items()})
            print(f"  {way:24} {n:2} clients {kept.rates[-1]:7.0f} tokens/s   /health {probe.told()}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint directory with a chat template")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--skip", nargs="*", default=[], help="last words of ways to leave out, as in `continuous`")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    ways = [w for w in WAYS if w.split()[-1] not in args.skip]
    results: dict[tuple[str, int], Measured] = defaultdict(Measured)
    for turn in range(args.rounds):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            measure(way, args, results)

    print("\n| way | clients | tokens/s | ours is | first text, median s | p95 s | /health p50 ms | p99 | max |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for n in args.clients:
        for way in ways:
            m, ours = results[way, n], results["sftflow", n]
            ratio = f"{median(ours.rates) / median(m.rates):.2f} times" if way != "sftflow" else ""
            pings = [1000 * x for x in (percentile(m.health, 0.5), percentile(m.health, 0.99), max(m.health))]
            print(
                f"| {way} | {n} | {median(m.rates):,.0f} | {ratio} | {median(m.firsts):.3f} | "
                f"{percentile(m.firsts, 0.95):.3f} | " + " | ".join(f"{p:.1f}" for p in pings) + " |"
            )
    print()
    bad = 0
    alone: dict[int, str] = {}
    for n in args.clients:
        for way in ways:
            m = results[way, n]
            alone = alone or m.texts
            shared = [i for i in m.texts if i in results["sftflow", n].texts]
            equal = sum(m.texts[i] == results["sftflow", n].texts[i] for i in shared)
            first = sum(m.texts[i] == text for i, text in alone.items() if i in m.texts)
            print(f"{way} at {n}: {equal} of {len(shared)} replies equal ours beside as many clients, "
                  f"{first} of {len(alone)} ours alone")  # fmt: skip
            for problem in m.problems[:3]:
                print(f"  {len(m.problems)} failed: {problem}")
            bad += len(m.problems) if way == "sftflow" else 0
    if args.json:
        figures = [{"way": w, "clients": n, **vars(m)} for (w, n), m in results.items()]
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
