"""What a notebook's cell shows while something runs: places in its output that are drawn over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from markupsafe import Markup

from sftflow.comparison.run_artifacts import RunArtifacts
from sftflow.report.comparison_page import loss_cell
from sftflow.report.pages import cell, esc

EVERY_SECONDS = 0.5  # each drawing is sent to the browser


class Place:
    """A place in the output of the cell that runs. What is drawn there replaces what was."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn_at = -math.inf

    def draw(self, make: Callable[[], str], *, now: bool = True) -> None:
        """make: the HTML.   now: also where the last drawing is not long ago."""
        shown: Any = import_module("IPython.display")  # which only a notebook has
        at = time.perf_counter()
        if not now and at - self._drawn_at < EVERY_SECONDS:
            return
        self._drawn_at, html = at, shown.HTML(make())
        if self._handle is None:
            self._handle = shown.display(html, display_id=True)
        else:
            self._handle.update(html)

    def line(self, text: str, *, now: bool = True) -> None:
        self.draw(lambda: cell(_small(text)), now=now)

    def clear(self) -> None:
        if self._handle is not None:
            self.draw(str)


class LossPicture(Place):
    """The loss by step with the held-out losses, as far as the run has come, and a line under it."""

    def __init__(self) -> None:
        super().__init__()
        self._losses: list[tuple[int, float | None]] = []
        self._validation: list[Mapping[str, Any]] = []
        self._under = ""

    def step(self, step: int, loss: float, under: str, *, now: bool) -> None:
        self._losses.append((step, loss))
        self._under = under
        self.draw(self._drawn, now=now)

    def validation(self, step: int, loss: float, sources: Mapping[str, float | None]) -> None:
        self._validation.append({"step": step, "loss": loss, "sources": sources})
        self.draw(self._drawn)

    def _drawn(self) -> str:
        run = RunArtifacts(losses=self._losses, validation=self._validation)
        return loss_cell(run, _small(self._under)) or cell(_small("before the first step"))


def _small(text: str) -> Markup:
    return Markup('<div class="soft small">{}</div>').format(esc(text))
