"""What a person sees while something runs: progress with its ETA, on stderr; plain lines where that is no terminal."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from sftflow.foundation.ranks import ranks
from sftflow.foundation.runtime import Runtime, measure_peak, peak_memory
from sftflow.report.figures import plural
from sftflow.report.log_file import LogFile
from sftflow.report.notebook import LossPicture, Place
from sftflow.report.run_blocks import about, start_block
from sftflow.training.opening import Opening

PLAIN_EVERY_SECONDS = 5.0
LOGGED_EVERY_SECONDS = 600.0  # and each tenth of a stage
TELLING_STEPS, TELLING_SECONDS = 3, 10.0  # measured steps after which the time is told: so many, or so long ones
WINDOW = 20  # steps that rates and the ETA look back on


def stderr() -> Console:
    """Of several ranks the first speaks."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty(), quiet=not ranks().first)


def clock(seconds: float) -> str:
    """
    >>> clock(75), clock(3675.2)
    ('1:15', '1:01:15')
    """
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def memory_text(n_bytes: float) -> str:
    """
    >>> memory_text(700 * 2**20), memory_text(3 * 2**30)
    ('700 MiB', '3.0 GiB')
    """
    mib = n_bytes / 2**20
    return f"{mib:.0f} MiB" if mib < 1000 else f"{mib / 1024:.1f} GiB"


def fitted(start: str, parts: list[str], width: int) -> str:
    """As many parts as fit after the start, and the number of the rest.

    >>> fitted("a:", ["b 1", "c 2", "d 3"], 15)
    'a: b 1  +2 more'
    """
    for kept in range(len(parts), -1, -1):
        rest = [f"+{len(parts) - kept} more"] if kept < len(parts) else []
        line = f"{start} {'  '.join(parts[:kept] + rest)}".rstrip()
        if len(line) <= width:
            return line
    return start


class Pace:
    """Smoothed numbers of the steps so far. The first step of a process compiles and warms up, so that no rate or
    ETA looks at it once there is another."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0
        self.steps: deque[Any] = deque(maxlen=WINDOW)
        self.n_steps = 0

    def add(self, log: Any) -> None:
        """log: a StepLog."""
        self.n_steps += 1
        if self.n_steps == 2:
            self.steps.clear()
        self.steps.append(log)
        if math.isfinite(log.loss):  # one bad step must not make the average unusable for good
            self._sum, self._weight = 0.9 * self._sum + 0.1 * log.loss, 0.9 * self._weight + 0.1

    @property
    def loss(self) -> float:
        """The mean, recent steps counting more; the first steps are not drawn towards the very first."""
        return self._sum / self._weight if self._weight else math.nan

    @property
    def seconds(self) -> float:
        return max(1e-9, sum(s.seconds for s in self.steps))

    def rate(self, what: str) -> float:
        """So much a second of a number in the steps' logs: "supervised_tokens" or "flops"."""
        return sum(getattr(s, what) for s in self.steps) / self.seconds

    def padding(self) -> float:
        return sum(s.padding_share for s in self.steps) / len(self.steps)

    def left(self, steps: int) -> float | None:
        """Seconds that so many more steps will take; None while only the first is known."""
        return steps * self.seconds / len(self.steps) if self.n_steps > 1 else None


class TwoRows(Progress):
    """A running bar, whose one task has the fields `note` and `eta`, with a line of text under it."""

    under = ""

    def __init__(self, console: Console, stage: str, total: int | None) -> None:
        fields = ("description", "fields[note]", "fields[eta]")
        name, note, eta = (TextColumn(f"{{task.{field}}}", markup=False) for field in fields)
        columns = (name, BarColumn(bar_width=14), TaskProgressColumn(), note, TimeElapsedColumn(), eta)
        super().__init__(*columns, console=console)
        self.add_task(f"{stage:<8}", total=total, note="", eta="")
        self.start()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.under:
            yield Text(self.under, no_wrap=True, overflow="ellipsis")


class ProgressDisplay:
    """Shows one stage after another. In a terminal each is a bar, in a notebook a line that is drawn over, and of
    training the curve; piped, a line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or stderr()
        self.notebook = self.console.is_jupyter
        self.live = self.console.is_terminal and not self.notebook
        self.log = LogFile()
        self._progress: TwoRows | None = None
        self._line, self._picture = Place(), LossPicture()  # of a notebook
        self._stage = ""
        self._shown_at = 0.0
        self._began = 0.0
        self._logged = (-1, 0.0)
        self._pace = Pace()
        self._told = True
        self._device = "cpu"
        self._peak = 0.0

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        self._close()
        if error is not None:
            self.log.ended_by(error)

    def say(self, text: str | Text) -> None:
        """A line that stays; what was shown before it has ended."""
        self._close()
        self.console.print(text, markup=False, soft_wrap=True if isinstance(text, Text) else None)
        self.log.write(str(text))

    def note(self, text: str | Text, style: str = "") -> None:
        """A line that stays; a training bar goes on under it."""
        if self._stage != "train":
            self._close()
        self.console.print(text, markup=False, style=style, soft_wrap=True)
        self.log.write(str(text))

    def warned(self, text: str) -> None:
        """A warning of one of our modules; where logging is set up, that shows it."""
        (self.log.write if logging.getLogger().handlers else self.note)(text)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._line.clear()  # of a notebook: what follows shows that it is done
        self._stage, self._line = "", Place()

    def _show(
        self, stage: str, done: int, total: int | None, note: str = "", under: str = "", left: float | None = None
    ) -> None:
        """One stage's state. left: seconds that it will take from here on, where they are known."""
        now = time.perf_counter()
        begins = stage != self._stage
        if begins:
            self._close()
            self._stage, self._began = stage, now
        eta = "" if left is None or done == total else f"ETA {clock(left)}"
        words = (f"{stage}: {done}{f'/{total}' if total else ''}", note, under, eta)
        line, tenth = "  ".join(w for w in words if w), done * 10 // total if total else 0
        if begins or done == total or tenth > self._logged[0] or now - self._logged[1] >= LOGGED_EVERY_SECONDS:
            self._logged = (tenth, now)
            self.log.write(line)
        if self.notebook:
            if stage != "train":  # which has its picture
                self._line.line(line, now=begins or done == total)
        elif self.live:
            if self._progress is None:
                self._progress = TwoRows(self.console, stage, total)
            self._progress.under = under
            said = f"step {done:,}/{total:,}" if stage == "train" else note
            self._progress.update(TaskID(0), completed=done, total=total, note=said, eta=eta)
        elif begins or done == total or now - self._shown_at >= PLAIN_EVERY_SECONDS:
            self._shown_at = now
            self.console.print(line, markup=False)

    def counted(self, stage: str, done: int, total: int, note: str = "", *, before: int = 0) -> None:
        """A stage whose steps take about equally long.   before: so many of them had been done before it began."""
        same = self.live and done > before and stage == self._stage
        left = (time.perf_counter() - self._began) * (total - done) / (done - before) if same else None
        self._show(stage, done, total, note[:34], left=left)

    # ---- the listener of a training run

    def machine(self, runtime: Runtime) -> None:
        """Where the run computes: for the share of the peak and the memory. Measured once, and only shown."""
        self._device, self._peak = runtime.device, measure_peak(runtime) * ranks().world

    def begins(self, run: Opening) -> None:
        """What is said of a run before its first step. Its directory is its own now, and has the log."""
        self.log.open(run.out, anew=run.anew)
        self.say(start_block(run))
        self._picture = LossPicture()
        self._told = run.step_seconds is not None

    def rendering(self, source: str, rows: int) -> None:
        self._show("render", rows, None, source)

    def step(self, log: Any, total: int) -> None:
        """log: a StepLog."""
        self._pace.add(log)
        if log.skipped:
            text = f"step {log.step}: update skipped (loss {log.loss:.3g}, gradient norm {log.grad_norm:.3g})"
            self.note(text, style="bold yellow")
        left, steps = self._pace.left(total - log.step), self._pace.steps
        if left and not self._told and (len(steps) >= TELLING_STEPS or self._pace.seconds >= TELLING_SECONDS):
            self._told = True
            more = plural(total - log.step, "more step")
            measured = f"{'step' if len(steps) == 1 else f'steps {steps[0].step} to'} {log.step}"
            self._note_drawn(f"time        {about(left)} for {more} (measured over {measured})")
        under = self._details(log)
        self._show("train", log.step, total, under=under, left=left)
        if self.notebook:
            said = f"step {log.step:,} of {total:,}  {under}  {f'ETA {clock(left)}' if left else ''}"
            self._picture.step(log.step, log.loss, said, now=log.step == total)

    def _details(self, log: Any) -> str:
        """Loss first: a narrow terminal cuts the end off."""
        pace = self._pace
        parts = [f"loss {pace.loss:.3f} (step {log.loss:.3f})", f"{pace.rate('supervised_tokens'):,.0f} sup.tok/s"]
        if pace.rate("flops") > self._peak:  # it was measured while something else kept the machine busy
            self._peak = 0.0
        if self._peak and pace.rate("flops"):
            parts.append(f"{pace.rate('flops') / self._peak:.0%} of peak")
        parts.append(f"{pace.padding():.0%} padding")
        memory = peak_memory(self._device)
        return "  ".join(parts + ([memory_text(memory)] if memory else []))

    def validation(self, step: int, loss: float, sources: Mapping[str, float | None] | None = None) -> None:
        """Held-out loss; per source, where there are several, the highest first (a line has room for a few)."""
        known = {k: v for k, v in (sources or {}).items() if v is not None}
        worst = sorted(known.items(), key=lambda item: -item[1]) if len(sources or {}) > 1 else []
        parts = [f"{name if len(name) <= 16 else name[:15] + '…'} {value:.3f}" for name, value in worst]
        self._note_drawn(self._fitted(f"validation, step {step}: {loss:.4f} ", parts))
        if self.notebook:
            self._picture.validation(step, loss, sources or {})

    def evaluating(self, done: int, total: int) -> None:
        self.counted("evaluate", done, total)

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """A sample of the tasks, graded in the middle of training."""
        parts = [f"{name} {score:.2f}" for name, score in figures["tasks"].items()]
        parts += [f"{name.removesuffix('_rate').replace('_', ' ')} {x:.0%}" for name, x in figures["hygiene"].items()]
        self.note(self._fitted(f"evaluation, step {step}:", parts))

    def _fitted(self, start: str, parts: list[str]) -> str:
        return fitted(start, parts, self.console.width if self.live else 80)

    def _note_drawn(self, text: str) -> None:
        """A note of what a notebook's picture shows."""
        (self.log.write if self.notebook else self.note)(text)
