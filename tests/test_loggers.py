"""`train.logger`: each step reaches the service once, also over a crash and a resume; nothing it does stops a run."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sftflow.foundation.errors import RecipeError
from sftflow.recipe import Recipe, parse_recipe
from sftflow.training import loggers
from sftflow.training.loggers import LOGGERS, open_logger, require_logger
from sftflow.training.run_log import RunLog

Points = dict[str, list[tuple[int, float]]]  # name -> (step, value), in the order written
SAVE_EVERY, CRASH_AT, STEPS = 4, 7, 10

# Crashes before step 8, then goes on from the state saved at step 4. A process of its own: wandb and trackio
# keep settings of the process they are first imported in.
TWO_RUNS = f"""
import sys
from sftflow.recipe import load_recipe
from sftflow.training.run import run_training

class Listener:
    def __init__(self, crash_at):
        self.crash_at = crash_at
    def say(self, text):
        print(text, file=sys.stderr)
    def step(self, log, total):
        if log.step == self.crash_at + 1:
            raise KeyboardInterrupt
    def __getattr__(self, name):
        return lambda *_: None

recipe = load_recipe(sys.argv[1])
try:
    run_training(recipe, Listener({CRASH_AT}))
except KeyboardInterrupt:
    print("crashed")
print("resumed:", run_training(recipe, Listener(-1), resume=True).already_done)
"""


def recipe_file(folder: Path, base: Path, logger: str) -> Path:
    """Two sources, ten steps, a save and a validation every four; the run goes to folder/run."""
    rows = [{"prompt": f"What is {a}+{b}?", "completion": f"It is {a + b}."} for a in range(9) for b in range(9)]
    for name, part in (("sums", rows[:40]), ("more", rows[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    train = {"out": str(folder / "run"), "max_length": 64, "tokens_per_step": 256, "micro_tokens": 256}
    train |= {"steps": STEPS, "save_every": SAVE_EVERY, "lr": 0.003, "precision": "fp32", "logger": logger}
    recipe = {"base": str(base), "mixture": [{"source": "sums.jsonl"}, {"source": "more.jsonl"}], "validation": 4}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"train": train}))  # JSON is YAML
    return folder / "recipe.yaml"


def read_tensorboard(out: Path) -> tuple[Points, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    points = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return points, events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, which wandb's files are after 7 bytes of their own (the first block is shorter).

    Blocks of 32 KiB; in them pieces of (checksum, length, whole 1 | first 2 | middle 3 | last 4), data.
    """
    at, end, whole = 0, 32768 - 7, b""
    while at + 7 <= len(data):
        if end - at < 7:
            at, end = end, end + 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def read_wandb(out: Path) -> tuple[Points, str]:
    """The offline files of all parts, in their order. They must name one run."""
    from wandb.proto import wandb_internal_pb2

    points: Points = {}
    configs, ids = "", set()
    for path in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):
        for data in leveldb_records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                configs += "".join(f"{item.key}: {item.value_json}\n" for item in record.run.config.update)
            for item in record.history.item:
                name = item.key or ".".join(item.nested_key)
                points.setdefault(name, []).append((record.history.step.num, float(json.loads(item.value_json))))
    assert len(ids) == 1
    return points, configs


def read_trackio(out: Path) -> tuple[Points, str]:
    [database] = out.glob("trackio/*.db")
    points: Points = {}
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
        [(config,)] = connection.execute("SELECT config FROM configs").fetchall()
    assert len({run for run, _, _ in rows}) == 1
    for _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            points.setdefault(name, []).append((step, value))
    return points, config if isinstance(config, str) else config.decode()


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.mark.parametrize("name", READERS)
def test_a_crashed_and_resumed_run_logs_each_step_once(name: str, tmp_path: Path, tiny_base: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install 'sftflow[{name}]')")
    (tmp_path / "home").mkdir()
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TRACKIO_"))}
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, str(recipe_file(tmp_path, tiny_base, name))],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path / "home",
        env=quiet | {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home")},
    )
    assert done.stdout.splitlines() == ["crashed", "resumed: False"], done.stderr[-2000:]
    assert "goes on without it" not in done.stderr
    out = tmp_path / "run"
    points, config = READERS[name](out)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in points["train/loss"]] == list(range(1, STEPS + 1))
    assert [value for _, value in points["train/loss"]] == pytest.approx([m["loss"] for m in metrics], rel=1e-5)
    for key in ("lr", "grad_norm", "tokens_per_second"):
        assert len(points[f"train/{key}"]) == STEPS
    for source in ("sums", "more"):
        expected = [(m["step"], m["source_loss"][source]) for m in metrics if source in m["source_loss"]]
        assert [step for step, _ in points[f"train_loss/{source}"]] == [step for step, _ in expected]
    held_out = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [step for step, _ in points["validation/loss"]] == [0, 4, 8, 10] == [v["step"] for v in held_out]
    by_source = [value for _, value in points["validation_loss/sums"]]
    assert by_source == pytest.approx([v["sources"]["sums"] for v in held_out], rel=1e-5)
    assert "tokens_per_step" in config and "256" in config, "the resolved recipe goes along"
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file()], "everything is written inside train.out"


def test_a_missing_package_is_refused_before_any_work(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftflow.recipe import load_recipe
    from sftflow.training.run import run_training

    monkeypatch.setitem(sys.modules, "trackio", None)  # what Python itself takes for "not there"
    calls: list[str] = []

    class Listener:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: calls.append(name)

    with pytest.raises(RecipeError) as refused:
        run_training(load_recipe(recipe_file(tmp_path, tiny_base, "trackio")), Listener())
    assert str(refused.value) == (
        "train.logger: trackio is not installed; pip install 'sftflow[trackio]', or set train.logger to null"
    )
    assert not calls and not (tmp_path / "run" / "ledger.json").exists()
    require_logger(None)


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(RecipeError, match="wandb is not installed"):
        require_logger("wandb")


# ---- the logger alone, with a service that fails


class Broken:
    """Takes two steps, then its network is gone."""

    sent: list[tuple[int, dict[str, float]]]

    def __init__(self, *_: Any) -> None:
        Broken.sent = []

    def log(self, values: dict[str, float], step: int) -> None:
        if step > 2:
            raise ConnectionError("the network is gone\nsecond line")
        Broken.sent.append((step, values))

    def close(self, failed: bool) -> None:
        raise AssertionError("a logger that failed is not called again")


def recipe(logger: str | None) -> Recipe:
    return parse_recipe({"mixture": [{"source": "identity"}], "train": {"logger": logger}}, "test")


def step_log(step: int, loss: float = 1.0) -> Any:
    return SimpleNamespace(
        step=step, loss=loss, lr=0.1, grad_norm=2.0, tokens=10, supervised_tokens=5, seconds=0.5,
        padding_share=0.25, source_loss={"sums": loss}, skipped=loss != loss,
    )  # fmt: skip


def test_a_logger_that_fails_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGERS, "wandb", (Broken, False))
    said: list[str] = []
    with open_logger(recipe("wandb"), tmp_path, said.append, resumed_at=None) as logger:
        for step in range(1, 6):
            logger.step(step_log(step))
        logger.validation(5, 1.0, {"sums": 1.0})
    assert [step for step, _ in Broken.sent] == [1, 2]
    assert said == ["wandb: ConnectionError: the network is gone; training goes on without it"]


def test_a_logger_that_cannot_start_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> Any:
        raise RuntimeError("no key")

    monkeypatch.setitem(LOGGERS, "wandb", (start, False))
    said: list[str] = []
    with open_logger(recipe("wandb"), tmp_path, said.append, resumed_at=None) as logger:
        logger.step(step_log(1))
    assert said == ["wandb: RuntimeError: no key; training goes on without it"]


def test_a_step_whose_loss_is_no_number_is_sent_as_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGERS, "wandb", (Broken, False))
    monkeypatch.setattr(Broken, "close", lambda self, failed: None)
    with open_logger(recipe("wandb"), tmp_path, print, resumed_at=None) as logger:
        logger.step(step_log(1, loss=float("nan")))
    [(_, values)] = Broken.sent
    assert values["train/skipped"] == 1.0 and values["train/tokens_per_second"] == 20.0
    assert "train/loss" not in values and "train_loss/sums" not in values


def test_no_logger_does_nothing_and_writes_nothing(tmp_path: Path) -> None:
    with open_logger(recipe(None), tmp_path, print, resumed_at=None) as logger:
        logger.step(step_log(1))
        logger.validation(1, 1.0, {})
    assert not list(tmp_path.iterdir())


def test_a_run_that_starts_anew_in_a_used_folder_leaves_the_old_events_behind(tmp_path: Path) -> None:
    for value in (5.0, 3.0):
        with open_logger(recipe("tensorboard"), tmp_path, print, resumed_at=None) as logger:
            logger.step(step_log(1, value))
    points, _ = read_tensorboard(tmp_path)
    assert points["train/loss"] == [(1, 3.0)]


def test_resumed_before_the_first_save_writes_all_again(tmp_path: Path) -> None:
    for value, resumed_at in ((5.0, None), (3.0, 0)):
        with open_logger(recipe("tensorboard"), tmp_path, print, resumed_at=resumed_at) as logger:
            logger.validation(0, value, {})
            logger.step(step_log(1, value))
    points, _ = read_tensorboard(tmp_path)
    assert points["train/loss"] == [(1, 3.0)] and points["validation/loss"] == [(0, 3.0)]


def test_last_step_overlooks_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl")
    assert log.last_step(0) == 0
    log.path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert log.last_step(0) == 2


def test_the_recipe_knows_every_logger_and_pyproject_every_extra() -> None:
    import tomllib
    from typing import get_args

    from sftflow.recipe import Train

    words = {w for part in get_args(Train.model_fields["logger"].annotation) for w in get_args(part)}
    assert words == set(LOGGERS)
    project = Path(loggers.__file__).parents[3] / "pyproject.toml"
    if project.is_file():
        assert words <= set(tomllib.loads(project.read_text())["project"]["optional-dependencies"])
