"""What a person sees: progress with ETA and tables, on stderr; plain lines where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_SECONDS = 5.0


def stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


class Watch:
    """Shows one stage after another. In a terminal each is a bar; piped, a line now and then."""

    def __init__(self) -> None:
        self.console = stderr()
        self.live = self.console.is_terminal
        self._progress: Progress | None = None
        self._task: Any = None
        self._stage = ""
        self._shown_at = 0.0
        self._smoothed: float | None = None
        self._rate: float | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()

    def say(self, text: str) -> None:
        self._close()
        self.console.print(text, markup=False)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._stage = ""

    def _show(self, stage: str, done: int, total: int | None, note: str) -> None:
        if self.live:
            if self._progress is None or self._stage != stage:
                self._close()
                self._stage = stage
                self._progress = Progress(
                    TextColumn("{task.description:<10}"),
                    BarColumn(bar_width=14),
                    TaskProgressColumn(),
                    TextColumn("{task.fields[note]}"),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    console=self.console,
                    transient=False,
                )
                self._task = self._progress.add_task(stage, total=total, note=note)
                self._progress.start()
            self._progress.update(self._task, completed=done, total=total, note=note)
            return
        now = time.perf_counter()
        if stage != self._stage or now - self._shown_at >= PLAIN_EVERY_SECONDS or done == total:
            self._stage, self._shown_at = stage, now
            self.console.print(f"{stage}: {done}{f'/{total}' if total else ''} {note}".rstrip(), markup=False)

    # ---- the listener of a training run

    def rendering(self, source: str, rows: int) -> None:
        self._show("render", rows, None, source)

    def step(self, log: Any, total: int) -> None:
        self._smoothed = log.loss if self._smoothed is None else 0.9 * self._smoothed + 0.1 * log.loss
        rate = log.supervised_tokens / max(1e-9, log.seconds)
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        left = (total - log.step) * log.seconds
        note = f"loss {self._smoothed:.3f} ({log.loss:.3f})  {self._rate:,.0f} sup.tok/s"
        if not self.live:
            note += f"  ETA {left:.0f} s"
        self._show("train", log.step, total, note)

    def validation(self, step: int, loss: float) -> None:
        if not self.live:
            self.console.print(f"validation: step {step} loss {loss:.4f}")
        elif self._progress is not None:
            self._progress.console.print(f"validation loss at step {step}: {loss:.4f}")
        else:
            self.console.print(f"validation loss at step {step}: {loss:.4f}")

    # ---- other stages

    def counted(self, stage: str, done: int, total: int, note: str = "") -> None:
        self._show(stage, done, total, note[:34])


def score_table(document: dict[str, Any]) -> Table:
    """compare.json's tasks as a table that fits 80 columns."""
    continued = document.get("kind") == "continued SFT"
    before, after = ("before", "after") if continued else ("base", "SFT")
    table = Table(title=None, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, justify in (
        ("task", "left"),
        ("n", "right"),
        ("chance", "right"),
        (before, "right"),
        (after, "right"),
        ("gain", "right"),
        ("95% interval", "right"),
        ("verdict", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, t in document["tasks"].items():
        low, high = t["ci95"]
        colour = {"better": "green", "worse": "red"}.get(t["verdict"], "yellow")
        table.add_row(
            name,
            str(t["n"]),
            f"{t['chance']:.2f}",
            f"{t['base']:.2f}",
            f"{t['sft']:.2f}",
            f"{t['delta']:+.2f}",
            f"{low:+.2f} to {high:+.2f}",
            f"[{colour}]{t['verdict']}[/]",
        )
    mean = document["centred_mean"]
    table.add_section()
    table.add_row(
        "centred mean", "", "", f"{mean['base']:.2f}", f"{mean['sft']:.2f}", f"{mean['sft'] - mean['base']:+.2f}"
    )
    return table


def ledger_table(ledger: dict[str, Any]) -> Table:
    """ledger.json's sources as a table that fits 80 columns."""
    table = Table(title=None, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ("source", "rows", "repeat", "tokens", "superv.", "share", "cut", "dropped", "held")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
    for s in ledger["sources"]:
        share = s["supervised_tokens"] / s["tokens"] if s["tokens"] else 0.0
        table.add_row(
            s["name"],
            f"{s['rows']:,}",
            f"x{s['repeat']}",
            f"{s['tokens']:,}",
            f"{s['supervised_tokens']:,}",
            f"{share:.0%}",
            str(s["cut"]),
            str(s["dropped"]),
            str(s.get("validation_rows", 0)),
        )
    table.add_section()
    share = ledger["supervised_tokens"] / ledger["tokens"] if ledger["tokens"] else 0.0
    table.add_row(
        "all", f"{ledger['rows']:,}", "", f"{ledger['tokens']:,}", f"{ledger['supervised_tokens']:,}", f"{share:.0%}"
    )
    return table
