"""Many clients at one server: `sftflow serve` under load, and under clients that hang up.

    python benchmarks/soak.py [--model builtin:tiny] [--clients 64] [--seconds 60] [--leavers 200]

One client alone for 10 seconds; then `--clients` of them for `--seconds`, each asking again as soon as it is answered;
then all of `--leavers` at once, each hanging up at its first text. Everything is a streamed chat reply of up to
`--tokens` tokens. Checked, and printed with its number:

    errors        none, but 503 with Retry-After, after which the client asks again
    /health       99th percentile under 100 ms while all ask
    throughput    at least 3 times the tokens a second of one client
    memory        resident at the end within 5% + 16 MiB of what it was after the warm-up: two replies a client
    hang-ups      every slot free, nobody in line, the replies counted as cancelled, the next answered in under 5 s

Exits 1 where one fails. Linux (memory is read from /proc).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections import Counter
from typing import Any

import httpx
from load import (
    HealthProbe,
    Server,
    Streamed,
    client,
    percentile,
    questions,
    retried,
    serve_command,
    served,
    stream_chat,
)
from record import begin

failed: list[str] = []
facts: dict[str, str] = {}


def check(name: str, good: bool, told: str) -> None:
    print(f"{'ok    ' if good else 'FAILED'} {name}: {told}", flush=True)
    facts[name] = told.strip() if good else f"FAILED: {told}"
    if not good:
        failed.append(name)


def bodies(server: Server, tokens: int) -> list[dict[str, Any]]:
    """Seeded draws, so that replies differ and most run to their full length."""
    common = {
        "model": server.model,
        "max_tokens": tokens,
        "temperature": 1.0,
        "stream_options": {"include_usage": True},
    }
    return [{**common, "seed": i, "messages": m} for i, m in enumerate(questions(64))]


async def ask_for(
    server: Server, asked: list[dict[str, Any]], clients: int, seconds: float, heard: list[Streamed]
) -> float:
    """So many clients for so long; all that they hear goes to `heard`. Returns tokens a second."""
    until = time.monotonic() + seconds
    async with client(clients) as web:

        async def one(number: int) -> None:
            turn = number
            while time.monotonic() < until:
                heard.extend(await retried(web, server.url, asked[turn % len(asked)]))
                turn += clients

        began = time.perf_counter()
        await asyncio.gather(*(one(i) for i in range(clients)))
        return sum(h.tokens for h in heard) / (time.perf_counter() - began)


async def watch_memory(server: Server, seconds: float, heard: list[Streamed], warm: int) -> list[float]:
    """Resident MiB, twice a second, from when `warm` answers have been heard: every slot has held long replies then,
    and the allocator has what it needs."""
    until = time.monotonic() + seconds
    seen = []
    while time.monotonic() < until:
        if len(heard) >= warm:
            seen.append(server.resident_mib())
        await asyncio.sleep(0.5)
    return seen


def gauges(server: Server) -> Counter[str]:
    """The numbers of /metrics that are about replies: running, waiting, and ended by how."""
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    out: Counter[str] = Counter()
    for name, ended, value in re.findall(
        r'^sftflow_replies_(\w+)\{model="[^"]*"(?:,ended="(\w+)")?\} (\d+)', text, re.M
    ):
        out[ended or name] += int(value)
    return out


def loaded(server: Server, asked: list[dict[str, Any]], clients: int, seconds: float) -> dict[int, dict[str, float]]:
    """Figures by number of clients."""
    alone = asyncio.run(ask_for(server, asked, 1, min(10.0, seconds), []))
    heard: list[Streamed] = []

    async def both() -> tuple[float, list[float]]:
        return await asyncio.gather(
            ask_for(server, asked, clients, seconds, heard), watch_memory(server, seconds, heard, 2 * clients)
        )

    with HealthProbe(server.url) as probe:
        together, memory = asyncio.run(both())
    kinds = Counter(h.status for h in heard)
    wrong = [h for h in heard if h.error and not (h.status == 503 and h.retry_after is not None)]
    told = ", ".join(f"{n} x {status}" for status, n in sorted(kinds.items()))
    check("errors", not wrong, f"{len(wrong)} ({told}) {wrong[0].error if wrong else ''}")
    check("/health", percentile(probe.seconds, 0.99) < 0.1, probe.told())
    told = f"{together:,.0f} tokens/s with {clients} clients, {alone:,.0f} with one: {together / alone:.2f} times"
    check("throughput", together >= 3 * alone, told)
    figures = {"tokens_per_second": together, "health_p50_ms": 1000 * percentile(probe.seconds, 0.5),
               "health_p99_ms": 1000 * percentile(probe.seconds, 0.99)}  # fmt: skip
    if len(memory) < 20:
        check("memory", False, f"{len(memory)} readings after {2 * clients} replies are too few; give more --seconds")
        return {1: {"tokens_per_second": alone}, clients: figures}
    begin, end = max(memory[:10]), max(memory[-10:])
    told = f"{begin:,.0f} MiB after the warm-up, {end:,.0f} at the end, {len(memory) / 2:.0f} s later"
    check("memory", end <= 1.05 * begin + 16, told)
    return {1: {"tokens_per_second": alone}, clients: {**figures, "memory_mib": end}}


def left(server: Server, asked: list[dict[str, Any]], leavers: int) -> None:
    before = gauges(server)

    async def all_of_them() -> list[Streamed]:
        async with client(leavers) as web:
            heard = await asyncio.gather(
                *(retried(web, server.url, asked[i % len(asked)], leave=True) for i in range(leavers))
            )
        return [h for one in heard for h in one]

    heard = asyncio.run(all_of_them())
    began = time.perf_counter()

    async def next_one() -> Streamed:
        async with client(1) as web:
            return await stream_chat(web, server.url, {**asked[0], "max_tokens": 8})

    answer = asyncio.run(next_one())
    seconds = time.perf_counter() - began
    wrong = [h for h in heard if h.error and not (h.status == 503 and h.retry_after is not None)]
    told = Counter(h.status for h in heard)
    check("hang-ups", not wrong, f"{told[200]} hung up at their first text, {told[503]} were told to come back; "
          f"{len(wrong)} errors {wrong[0].error if wrong else ''}")  # fmt: skip
    good = answer.finish is not None and not answer.error and seconds < 5
    check("the next request", good, f"answered in {seconds:.2f} s {answer.error or ''}")
    for _ in range(50):  # the counters follow the last chunk by a moment
        after = gauges(server)
        if not (after["running"] or after["waiting"]):
            break
        time.sleep(0.1)
    cancelled = after["cancelled"] - before["cancelled"]
    check(
        "slots", not (after["running"] or after["waiting"]), f"{after['running']} running, {after['waiting']} waiting"
    )
    # A reply may have ended by itself between its first text and the hang-up.
    check("cancelled", cancelled >= 0.8 * leavers, f"{cancelled} of {leavers} replies were given up")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--leavers", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=96)
    args, record = begin(parser, "soak", rounds=1, small={"clients": 16, "seconds": 20.0, "leavers": 40, "tokens": 48})
    for _ in record.turns():
        with served(serve_command(args.model)) as server:
            asked = bodies(server, args.tokens)
            asyncio.run(ask_for(server, asked, 2, 0.5, []))
            for n, values in loaded(server, asked, args.clients, args.seconds).items():
                record.add("sftflow", values, clients=n)
            left(server, [{**body, "max_tokens": 400} for body in asked], args.leavers)
    record.facts |= facts
    record.finish()
    print(f"failed: {', '.join(failed)}" if failed else "all good")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
