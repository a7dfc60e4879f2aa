"""`sftflow serve` beside `transformers serve`: the same checkpoint, questions and greedy decoding in fp32, as clients
see it: streamed chat replies over HTTP on this machine.

    python benchmarks/serve.py [--model DIR] [--clients 1 8 32] [--tokens 64] [--rounds 2] [--skip continuous]

    sftflow                    `sftflow serve DIR`
    transformers               `transformers serve DIR`: its replies are computed one after another
    transformers continuous    the same with `--continuous-batching` and a cache of CACHE (on a CPU its own choice is
                               most of the memory, and 5.23 does not answer)

`transformers serve` needs what transformers[serving] names; the extra `dev` of this project has it. One server runs at
a time, in rounds whose order turns. At each number of clients every client asks its questions one after another, 4 in
all where it is alone and else 2 each; a short warm-up is not counted. tokens/s: generated ones, as each server counts
them. Between tokens: from one text of a reply to its next, as it comes to the client. Further: the median of the
seconds until the first text, /health under that load, and how many of the replies are equal, letter for letter, to ours
at as many clients. Exits with 1 where a request to ours failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from itertools import pairwise
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
from record import Record, begin

WAYS = ("sftflow", "transformers", "transformers continuous")
CACHE = ("--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "512", "--no-cb-use-cuda-graph")


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


def measure(way: str, args: argparse.Namespace, record: Record) -> dict[int, dict[int, Streamed]]:
    """Answers by number of clients and question; the figures go into the record."""
    port, model = (0, None) if way == "sftflow" else (free_port(), args.path)
    out: dict[int, dict[int, Streamed]] = {}
    with served(command(way, args.path, port), port=port, model=model) as server:
        asyncio.run(load(server, questions(2), 2, 8))
        for n in args.clients:
            asked = questions(4 if n == 1 else 2 * n)
            with HealthProbe(server.url) as probe:
                out[n], seconds = asyncio.run(load(server, asked, n, args.tokens))
            good = [a for a in out[n].values() if not a.error]
            between = [1000 * (b - a) for x in good for a, b in pairwise(x.came)]
            values = {
                "tokens_per_second": sum(a.tokens for a in good) / seconds,
                "first_text_seconds": median([a.first for a in good if a.text]),
                "gap_p50_ms": percentile(between, 0.5),
                "gap_p99_ms": percentile(between, 0.99),
                "health_p50_ms": 1000 * percentile(probe.seconds, 0.5),
                "health_p99_ms": 1000 * percentile(probe.seconds, 0.99),
            }
            record.add(way, {k: v for k, v in values.items() if v == v}, clients=n)
    return out


def hugging_face(model: str, folder: str) -> str:
    """A directory of the checkpoint that transformers reads, too: its own, or one written here."""
    if (Path(model) / "config.json").is_file():
        return str(Path(model).resolve())
    import torch

    from sftflow.checkpoint import load_assistant, save

    assistant = load_assistant(model)
    target = Path(folder) / "model"
    save(target, assistant.model, assistant.tokenizer, assistant.renderer, dtype=torch.float32, meta={})
    return str(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny", help="what sftflow opens; transformers gets a copy")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--skip", nargs="*", default=[], help="last words of ways to leave out, as in `continuous`")
    args, record = begin(parser, "serve", rounds=2, small={"clients": [1, 8], "tokens": 32})
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ways = [w for w in WAYS if w.split()[-1] not in args.skip]
    if not Path(command("transformers", "", 0)[0]).is_file():
        record.skip("transformers serve", "transformers[serving] is not installed")
        ways = ["sftflow"]
    equal: dict[str, list[bool]] = {}
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        args.path = hugging_face(args.model, folder)
        for _ in record.turns():
            answers = {}
            for way in record.turned(ways):
                try:
                    answers[way] = measure(way, args, record)
                except RuntimeError as error:
                    if way == "sftflow":
                        raise
                    record.skip(way, str(error).splitlines()[-1])
            for way, by_clients in answers.items():
                for n, heard in by_clients.items():
                    failed = [a.error for a in heard.values() if a.error]
                    if failed:
                        record.facts[f"failed, {way} at {n}"] = f"{len(failed)}: {failed[0]}"
                        bad += way == "sftflow"
                    mine = answers["sftflow"][n]
                    if way != "sftflow":
                        equal.setdefault(f"{way} at {n}", []).extend(a.text == mine[i].text for i, a in heard.items())
    for name, same in equal.items():
        record.facts[f"replies equal to ours, {name}"] = f"{sum(same)} of {len(same)}"
    record.finish()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
