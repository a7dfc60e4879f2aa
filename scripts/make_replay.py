"""Writes src/sftflow/data/replay.jsonl.bz2, the text behind `builtin:replay`: what the shipped base itself writes.

    python scripts/make_replay.py            # minutes on one thread; again after every change of the base

Each document is drawn from the base's own distribution (temperature 1, nothing cut off), from its first token on, by a
seed of its own: what fine-tuning must not forget is what the base would say, and none of the text that it was trained
on is shipped. A document that fills the context does not end there, and its row says so. The same base, libraries and
processor give the same file.
"""

from __future__ import annotations

import argparse
import bz2
import json
import time
from pathlib import Path

import torch

import sftflow
from sftflow.chat.format import builtin_format
from sftflow.chat.render import Renderer
from sftflow.checkpoint import resolve
from sftflow.checkpoint.loading import load_model, load_tokenizer
from sftflow.foundation.runtime import detect
from sftflow.generation.engine import Engine
from sftflow.generation.request import GenerationRequest, Reply
from sftflow.generation.sampling import derived_seed

TARGET = Path(sftflow.__file__).parent / "data" / "replay.jsonl.bz2"
MOST_BYTES = 700_000


def main() -> None:
    parser = argparse.ArgumentParser(description="write the text behind builtin:replay")
    parser.add_argument("--base", default="builtin:tiny", help="who writes it")
    parser.add_argument("--documents", type=int, default=1300, help="as many, or as fit into 700 kB packed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the file must not hang on the number of cores
    started = time.perf_counter()
    location = resolve(args.base)
    model, _ = load_model(location)
    tokenizer = load_tokenizer(location)
    # A format that adds no tokens: what is drawn are the words that the base was trained on.
    renderer = Renderer(tokenizer, builtin_format("alpaca"))
    engine = Engine(model.eval(), renderer, detect("fp32"), max_running=128)
    prompt = renderer.document_opening or renderer.document_end
    asked = [
        GenerationRequest(
            prompt_ids=prompt,
            max_new_tokens=engine.context - len(prompt),
            temperature=1.0,
            seed=derived_seed(args.seed, number),
            stop_ids=frozenset(renderer.document_end),
            use_python=False,
        )
        for number in range(args.documents)
    ]
    done = 0

    def told(_: int, __: Reply) -> None:
        nonlocal done
        done += 1
        print(f"\r{done:,} of {len(asked):,} documents", end="", flush=True)

    replies = [reply for reply in engine.generate(asked, told) if reply.text.strip()]
    n = most_that_fit([row_of(reply) for reply in replies])
    args.out.write_bytes(packed([row_of(reply) for reply in replies[:n]]))
    tokens, ended = sum(r.n_generated for r in replies[:n]), sum(r.finish_reason == "stop" for r in replies[:n])
    print(
        f"\r{n:,} documents of {tokens:,} tokens, {ended:,} of which end, in {args.out.stat().st_size:,} bytes; "
        f"{time.perf_counter() - started:.0f} seconds"
    )


def row_of(reply: Reply) -> str:
    """A line of the file. Bytes that are no whole character stand for nothing, and are left out."""
    ends = {} if reply.finish_reason == "stop" else {"ends": False}
    return json.dumps({"text": reply.text.replace("\ufffd", ""), **ends}, ensure_ascii=False) + "\n"


def packed(rows: list[str]) -> bytes:
    return bz2.compress("".join(rows).encode())


def most_that_fit(rows: list[str]) -> int:
    """How many of the first rows fit into MOST_BYTES when packed."""
    fits, fails = 0, len(rows) + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if len(packed(rows[:middle])) <= MOST_BYTES else (fits, middle)
    return fits


if __name__ == "__main__":
    main()
