"""What a person sees while training: it fits 80 columns, says what matters, and is not fooled by a first slow step."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from rich.console import Console

from sftflow.evaluation.journal import EvalRow
from sftflow.evaluation.results import EvalResult, Evaluation, ModelScores
from sftflow.foundation.runtime import Runtime, measure_peak, peak_memory
from sftflow.report import tables
from sftflow.report.progress import Pace, ProgressDisplay, fitted

FP32 = Runtime(device="cpu", precision="fp32", reason="test")


def step_log(step: int, **changes: Any) -> Any:
    """A StepLog of a large run: every number as wide as it gets."""
    values: dict[str, Any] = dict(
        step=step, loss=12.345, lr=0.1, grad_norm=2.0, tokens=200_000, supervised_tokens=100_000, seconds=1.0,
        padding_share=0.13, flops=3e12, source_loss={}, skipped=False,
    )  # fmt: skip
    return SimpleNamespace(**(values | changes))


class Screen(ProgressDisplay):
    """A ProgressDisplay that writes to memory, as a terminal of 80 columns or as a pipe."""

    def __init__(self, live: bool, width: int = 80) -> None:
        self.output = io.StringIO()
        super().__init__(
            Console(file=self.output, force_terminal=live, width=width, highlight=False, soft_wrap=not live)
        )

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.output.getvalue().splitlines()]

    def rows(self) -> list[str]:
        """The two rows of the progress display, as they stand."""
        assert self._progress is not None
        plain = Console(file=io.StringIO(), width=self.console.width, color_system=None)
        with plain.capture() as captured:
            plain.print(self._progress.get_renderable())
        return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("width", [80, 60])
def test_the_live_line_fits_the_terminal(width: int) -> None:
    with Screen(live=True, width=width) as watch:
        watch._peak = 1e13
        for step in (1, 2, 1234):
            watch.step(step_log(step), 12_000)
        first, second = watch.rows()
    assert len(first) <= width and len(second) <= width
    assert "step 1,234/12,000" in first and "ETA 2:59:26" in first
    assert second.startswith("loss 12.345 (step 12.345)  100,000 sup.tok/s")
    if width == 80:
        assert "30% of peak  13% padding" in second and second.endswith("iB"), "nothing is cut off at 80 columns"


def test_piped_it_writes_plain_lines() -> None:
    with Screen(live=False) as watch:
        watch._peak = 1e13
        watch.step(step_log(1), 3)
        watch._shown_at -= 60
        watch.step(step_log(2, loss=2.0), 3)
        watch.step(step_log(3, loss=2.0), 3)
    first, middle, last = watch.lines
    assert first.startswith("train: 1/3  loss 12.345 (step 12.345)  100,000 sup.tok/s  30% of peak  13% padding")
    assert "ETA" not in first, "the first step compiles: nothing is known yet"
    assert middle.startswith("train: 2/3  loss 6.900 (step 2.000)") and middle.endswith("iB  ETA 0:01")
    assert last.startswith("train: 3/3") and "ETA" not in last, "the last step is shown, soon as it comes after another"
    assert "\x1b" not in watch.output.getvalue()


def test_unknown_peak_or_work_is_left_out() -> None:
    for peak, flops in ((0.0, 3e12), (1e13, 0.0)):
        with Screen(live=False) as watch:
            watch._peak = peak
            watch.step(step_log(1, flops=flops), 2)
        assert "of peak" not in watch.lines[0]


def test_a_peak_that_the_run_itself_exceeds_is_left_out_from_then_on() -> None:
    with Screen(live=False) as watch:
        watch._peak = 1.5e12  # measured on a busy machine
        for step, seconds in ((1, 2.5), (2, 0.5), (3, 9.0)):
            watch._shown_at -= 60
            watch.step(step_log(step, flops=3e12, seconds=seconds), 3)
    assert ["of peak" in line for line in watch.lines] == [True, False, False]


def test_pace_forgets_the_first_step_and_old_ones() -> None:
    pace = Pace()
    pace.add(step_log(1, seconds=60.0))
    assert pace.left(10) is None and pace.rate("supervised_tokens") == pytest.approx(100_000 / 60)
    pace.add(step_log(2, seconds=2.0))
    assert pace.left(10) == pytest.approx(20) and pace.rate("supervised_tokens") == pytest.approx(50_000)
    for step in range(3, 40):
        pace.add(step_log(step, seconds=4.0, padding_share=0.5))
    assert pace.left(10) == pytest.approx(40) and pace.padding() == 0.5


@pytest.mark.parametrize(
    ("seconds", "at", "line"),
    [
        (2.0, 4, "time        about 3 min for 96 more steps (measured over steps 2 to 4)"),
        (30.0, 2, "time        about 49 min for 98 more steps (measured over step 2)"),
    ],
)
def test_the_time_is_told_once_it_is_known(seconds: float, at: int, line: str) -> None:
    with Screen(live=False) as watch:
        watch._told = False
        for step in range(1, 8):
            assert sum("time  " in x for x in watch.lines) == (step > at)
            watch.step(step_log(step, seconds=seconds if step > 1 else 500.0), 100)
    assert [x for x in watch.lines if x.startswith("time")] == [line]


def test_a_skipped_step_is_said_and_does_not_spoil_the_average() -> None:
    for live in (False, True):
        with Screen(live=live) as watch:
            watch.step(step_log(1, loss=2.0), 3)
            watch.step(step_log(2, loss=float("nan"), grad_norm=float("inf"), skipped=True), 3)
            watch.step(step_log(3, loss=2.0), 3)
            assert watch._pace.loss == pytest.approx(2.0)
        said = "step 2: update skipped (loss nan, gradient norm inf)"
        assert sum(said in line for line in watch.lines) == 1
        assert "step 1:" not in watch.output.getvalue()


def test_validation_names_the_sources_that_fit_worst_first() -> None:
    with Screen(live=False) as watch:
        watch.validation(200, 1.5, {"one": 1.5})
        watch.validation(200, 1.5, {"low": 0.25, "high": 2.5, "none": None})
        watch.validation(200, 1.5, {f"a source with a long name {i}": float(i) for i in range(12)})
        watch.validation(200, 1.5)
    one, two, many, bare = watch.lines
    assert one == bare == "validation, step 200: 1.5000", "one source is the whole"
    assert two == "validation, step 200: 1.5000  high 2.500  low 0.250"
    assert len(many) <= 80 and many.endswith("+11 more") and "a source with a… 11.000" in many


def test_fitted_keeps_the_start_where_nothing_fits() -> None:
    assert fitted("start", ["long part"], 5) == "start"
    assert fitted("start", [], 80) == "start"


def test_every_stage_of_the_terminal_fits_80_columns() -> None:
    with Screen(live=True) as watch:
        watch.counted("evaluate", 5, 1200, "a_task_with_a_long_name: some/model/with-a-long-name")
        rows = watch.rows()
        watch.rendering("source", 123_456)
        rows += watch.rows()
    assert all(len(row) <= 80 for row in rows) and "evaluate" in rows[0] and "render" in rows[-1]


def test_the_peak_is_plausible_and_leaves_the_random_state_alone() -> None:
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    for precision in ("fp32", "bf16"):
        peak = measure_peak(Runtime(device="cpu", precision=precision, reason="test"))
        assert 1e8 < peak < 1e15, "FLOP/s of one processor"
    assert torch.equal(torch.get_rng_state(), before)


def test_machine_makes_the_share_of_the_peak_show() -> None:
    with Screen(live=False) as watch:
        watch.machine(FP32)
        watch.step(step_log(1, flops=watch._peak / 2), 2)
    assert "50% of peak" in watch.lines[0]


def test_memory_is_in_bytes() -> None:
    import torch

    assert 50 * 2**20 < peak_memory("cpu") < 2**42, "torch alone takes more than 50 MiB"
    before = peak_memory("cpu")
    block = torch.ones(before // 4)  # fp32: as much again as the process has ever held
    assert peak_memory("cpu") >= before + block.nbytes // 2


def test_scores_as_a_table_tell_counts_from_shares() -> None:
    asked: dict[str, Any] = {"id": "a", "question": "?", "answer": "", "n_prompt": 1, "prompt_sha256": ""}
    got: dict[str, Any] = {"reply": "", "finish_reason": "stop", "n_generated": 1, "seconds": 0.0}
    rows = tuple(EvalRow(**asked, **got, score=score) for score in (0.0, 1.0))
    metrics = {"prompt_loose": 1.0, "unsupported": 1}
    result = EvalResult(task="ifeval", arm="chat", chance=0.0, rows=rows, metrics=metrics, provenance={})
    evaluation = Evaluation({"m": ModelScores((result,)), "none": ModelScores(())})
    out = io.StringIO()
    Console(file=out, width=80).print(tables.eval_table(evaluation))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["prompt_loose", "1.000"] in lines and ["unsupported", "1"] in lines
    assert ["m", "centred", "mean", "0.500"] in lines and not any(line[:1] == ["none"] for line in lines)


def test_a_notebook_s_curve_is_drawn_over_in_place() -> None:
    """In a real shell of IPython, whose outputs are collected."""
    shell = InteractiveShell.instance()
    with capture_output() as captured, ProgressDisplay(Console(force_jupyter=True, width=80)) as watch:
        watch._picture.validation(0, 4.5, {"<dialogue>": 5.0, "sums": 4.0})
        for step in range(1, 21):
            watch.step(step_log(step, loss=5.0 - step / 10), 20)
        watch.validation(20, 2.5, {"<dialogue>": 3.0, "sums": 2.0})
        for done in (1, 2, 3):
            watch.counted("evaluate", done, 3, "sums: <base>")
    type(shell).clear_instance()
    outputs = captured._outputs
    drawn = [o["data"]["text/html"] for o in outputs if "text/html" in o["data"]]
    curves = [html for html in drawn if "Loss by step" in html]
    assert len(curves) >= 2 and "&lt;dialogue&gt;" in curves[-1] and "step 20 of 20" in curves[-1]
    assert "<dialogue>" not in "".join(drawn) and "step 20: held-out loss 2.5000" in curves[-1]
    assert not any("validation, step" in html for html in drawn)
    assert any("evaluate: 3/3" in html and "&lt;base&gt;" in html for html in drawn)
    assert drawn[-1] == "", "what is done is no longer told"
    # What is drawn is drawn over: one place for the curve, one for the line.
    places = [o["transient"]["display_id"] for o in outputs if o["transient"]]
    assert len(set(places)) == 2
