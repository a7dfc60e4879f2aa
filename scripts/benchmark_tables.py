"""Write the measured figures of benchmarks/results/ into the pages that show them.

    python scripts/benchmark_tables.py            # rewrites what stands between the markers (a test compares)

In a page, `<!-- figures: generate.demo -->` and `<!-- end of figures -->` enclose the tables of all files whose name
begins so, one for each machine, with its processor, versions and date. `<!-- figures: train.NAME | TRL padded -->`
shows only the ways that begin with one of the words after the bar (and ours), which is what a summary needs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- figures: (\S+)(?: \| (.+?))? -->\n).*?(<!-- end of figures -->)", re.S)

sys.path.insert(0, str(ROOT / "benchmarks"))
from figures import command, described, table  # noqa: E402


def measured(start: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """The contents of the files whose name begins with this and a full stop, in the order of their names."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob(f"{start}.*.json"))]


def block(start: str, ways: str | None = None, results: Path = RESULTS) -> str:
    """What belongs between the markers. Raises SystemExit where there is no such file."""
    files = measured(start, results)
    if not files:
        raise SystemExit(f"no file {start}.*.json in {results.name}/; run the benchmark, or take the markers out")
    parts = []
    for data in files:
        shown = {**data, "rounds": [r for r in data["rounds"] if _wanted(r["way"], ways)]}
        lines = [f"    {command(data)}", described(data), table(shown)]
        lines += ["".join(f"- {name}: {fact}\n" for name, fact in data["facts"].items()).rstrip()] if not ways else []
        lines += [f"Not measured: {'; '.join(f'{n} ({why})' for n, why in data['skipped'].items())}."
                  if data["skipped"] and not ways else ""]  # fmt: skip
        parts.append("\n\n".join(x for x in lines if x))
    return "\n" + "\n\n".join(parts) + "\n\n"


def _wanted(way: str, ways: str | None) -> bool:
    return ways is None or way == "sftflow" or way.startswith(tuple(w.strip() for w in ways.split(",")))


def rewritten(page: str, results: Path = RESULTS) -> str:
    """The page with all that stands between markers made anew."""
    return MARKED.sub(lambda m: m[1] + block(m[2], m[3], results) + m[4], page)


if __name__ == "__main__":
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = rewritten(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")
