"""Write the measured figures of benchmarks/results/ into the pages that show them.

    python scripts/benchmark_tables.py            # rewrites what stands between the markers (a test compares)

In a page, `<!-- figures: generate.demo -->` and `<!-- end of figures -->` enclose the tables of all files whose name
begins so, one for each machine, with its processor, versions and date; where there is no such file yet, what stands
there is left. `<!-- figures: train.NAME | summary -->` is ours beside the best of the others in a few lines.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- figures: (\S+)(?: \| (.+?))? -->\n).*?(<!-- end of figures -->)", re.S)

sys.path.insert(0, str(ROOT / "benchmarks"))
from figures import OURS, VALUES, command, described, table  # noqa: E402


def measured(start: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """The contents of the files whose name begins with this and a full stop, in the order of their names."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob(f"{start}.*.json"))]


def block(start: str, kind: str | None = None, results: Path = RESULTS) -> str | None:
    """What belongs between the markers; None where there is no such file."""
    parts = []
    for data in measured(start, results):
        lines = [described(data), summary(data) if kind == "summary" else table(data)]
        if kind != "summary":
            lines = [f"    {command(data)}", *lines, "\n".join(f"- {name}: {x}" for name, x in data["facts"].items())]
            lines += [f"Not measured: {what} ({why})." for what, why in data["skipped"].items()]
        parts.append("\n\n".join(x for x in lines if x))
    return "\n" + "\n\n".join(parts) + "\n\n" if parts else None


def summary(data: dict[str, Any]) -> str:
    """Ours beside the best of the others, a line for each value that tells how good a way is. By the value that the
    file compares the best is chosen; of memory, the least that any of them needs."""
    runs: dict[str, list[dict[str, float]]] = {}
    for r in data["rounds"]:
        runs.setdefault(r["way"], []).append(r["values"])

    def median_of(way: str, name: str) -> float:
        return statistics.median(values[name] for values in runs[way])

    peers = [way for way in runs if not way.startswith(OURS)]
    lines = ["| | best of the others | sftflow | |", "|---|--:|--:|---|"]
    for name in (data["compared"], "memory_mib"):
        if peers and all(name in values for way in (OURS, *peers) for values in runs[way]):
            better = max if VALUES[name].more else min
            best = better(peers, key=lambda way: median_of(way, name))
            mine, other = median_of(OURS, name), median_of(best, name)
            told = f"{mine / other:.2f} times" if VALUES[name].more else f"{mine / other:.2f} of it"
            form = VALUES[name].form
            lines.append(f"| {VALUES[name].head} | {form.format(other)} ({best}) | {form.format(mine)} | {told} |")
    return "\n".join(lines)


def rewritten(page: str, results: Path = RESULTS) -> str:
    """The page with all that stands between markers made anew."""

    def made(m: re.Match[str]) -> str:
        text = block(m[2], m[3], results)
        return m[0] if text is None else m[1] + text + m[4]

    return MARKED.sub(made, page)


if __name__ == "__main__":
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")
