"""Hold a demo run against the README's table: check_demo.py RUN

Each task must be better than the base beyond doubt, and its score within 0.15 of the README's: the last digits hang on
how the machine multiplies. Leaves with 1 where one is not.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

WITHIN = 0.15
README = Path(__file__).resolve().parents[1] / "README.md"
ROW = re.compile(r"^\| (\w+)[^|]*\| (\d+) \| [\d.]+ \| ([\d.]+) \|", re.M)


def main(run: Path) -> int:
    promised = {name: (int(n), float(score)) for name, n, score in ROW.findall(README.read_text(encoding="utf-8"))}
    measured = json.loads((run / "compare.json").read_text(encoding="utf-8"))["tasks"]
    wrong = [] if set(promised) == set(measured) else [f"tasks {sorted(measured)}, in the README {sorted(promised)}"]
    for name in sorted(set(promised) & set(measured)):
        (n, score), task = promised[name], measured[name]
        good = task["n"] == n and abs(task["sft"] - score) <= WITHIN and task["ci95"][0] > 0
        line = f"{name:14} {task['sft']:.2f} (README {score:.2f}), gain at least {task['ci95'][0]:+.2f}, n {task['n']}"
        print(("ok    " if good else "WRONG ") + line)
        wrong += [] if good else [name]
    for line in wrong:
        print(f"demo: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
