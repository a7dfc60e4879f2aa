"""A log of a run: a JSON object a line, in the order of the steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sftflow.foundation.atomic_io import finite, read_log, write_text
from sftflow.foundation.ranks import ranks


class RunLog:
    """Rows with a `step`. What is not finite is written as null, for NaN is not JSON. Of several ranks the first writes
    them."""

    def __init__(self, path: Path) -> None:
        self.path, self.writes = path, ranks().first

    def append(self, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")

    def to_disk(self) -> None:
        """A log must not fall behind the state that is saved next, not even in a power cut."""
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def last_step(self, default: int = -1) -> int:
        """The step of the last whole row; `default` where there is none."""
        steps = [row["step"] for row in read_log(self.path) if "step" in row]
        return int(steps[-1]) if steps else default

    def cut_back(self, step: int) -> None:
        """Drop the rows after `step`: a killed run wrote them, and the resumed one writes them again."""
        if self.writes and self.path.exists():
            kept = [row for row in read_log(self.path) if row.get("step", step + 1) <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
