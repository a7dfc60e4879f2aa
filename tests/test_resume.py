"""A run that is killed, stopped, starved of space or tampered with goes on bit for bit, or says in one line why not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.runs import Quiet, digest, error_line, leftovers, outcome, run, write_recipe
from helpers.runs import run as sftflow
from sftflow.foundation.atomic_io import Lock, sweep, write_directory
from sftflow.foundation.errors import CheckpointError, RunError
from sftflow.recipe import load_recipe
from sftflow.training.run import run_training
from sftflow.training.signals import Signals, Stopped


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    done = sftflow("train", str(write_recipe(folder, tiny_base)))
    assert done.returncode == 0, done.stderr
    found = outcome(folder / "run")
    assert len(found["metrics.jsonl"]) == 24 and len(found["validation.jsonl"]) == 7
    assert len([k for k in found if k.startswith("resume/")]) == 2
    return found


class StopAt(Quiet):
    """A listener that sends this process a signal after a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.at, self.number = step, number

    def step(self, log: Any, total: int) -> None:
        if log.step == self.at:
            os.kill(os.getpid(), self.number)


def stopped_run(folder: Path, base: Path, at: int = 17, **train: Any) -> Path:
    """A run that SIGTERM stopped; its recipe."""
    recipe = write_recipe(folder, base, **train)
    with pytest.raises(Stopped) as stopped:
        run_training(load_recipe(recipe), StopAt(at))
    assert stopped.value.saved and stopped.value.exit_code == 143
    return recipe


# ---- kill -9


def kill_at(recipe: Path, out: Path, moment: tuple[str, int], delay: float = 0.0) -> bool:
    """Start (or resume) the run and kill it; whether it died while saving.

    moment: ("step", n) when n rows of metrics are written; ("resume", n) or ("checkpoint", n) while the state or the
    checkpoint of step n is being saved: the process is stopped first, to see that it really is at it.
    """
    what, step = moment
    process = subprocess.Popen(
        [sys.executable, "-m", "sftflow", "train", str(recipe), "--resume"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    patterns = {"resume": f"resume/.step-{step:08d}.*.tmp", "checkpoint": ".checkpoint.*.tmp"}
    metrics = out / "metrics.jsonl"

    def saving() -> bool:
        return what in patterns and any(out.glob(patterns[what]))

    def reached() -> bool:
        try:
            return metrics.read_bytes().count(b"\n") >= step
        except FileNotFoundError:
            return step == 0 and (out / ".lock").exists()

    try:
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            if not (saving() if what == "resume" else reached() and (what == "step" or saving())):
                continue
            time.sleep(delay)
            process.send_signal(signal.SIGSTOP)
            stat = Path(f"/proc/{process.pid}/stat")
            while process.poll() is None and stat.read_text().rpartition(")")[2].split()[0] not in "Tt":
                time.sleep(0.0005)
            if delay or what == "step" or saving():
                process.kill()
                break
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        code = process.wait(30)
    assert code == -signal.SIGKILL and not (out / "DONE").exists()
    return bool(leftovers(out))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="watches the process through /proc")
def test_killed_while_saving_twice_and_resumed(tiny_base: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base), tmp_path / "run"
    assert kill_at(recipe, out, ("checkpoint", 8))
    assert any(name.startswith(".checkpoint.") for name in leftovers(out))
    assert kill_at(recipe, out, ("resume", 16))
    assert any(name.startswith(".step-00000016.") for name in leftovers(out))
    said = (out / "log.txt").read_text()  # by both of them, up to their end
    assert said.count("  ---- ") == 2 and "  resumed at step 4 of 24; " in said and "  validation, step 16: " in said
    assert "an unfinished run is in it" in error_line(run("train", str(recipe)))
    resumed = sftflow("train", str(recipe), "--resume")
    assert resumed.returncode == 0 and "resumed at step 12 of 24" in resumed.stderr, resumed.stderr
    assert outcome(out) == whole
    assert leftovers(out) == []
    again = run("train", str(recipe), "--resume")
    assert again.returncode == 0 and "finished" in again.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="watches the process through /proc")
def test_killed_at_ten_moments(tiny_base: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    seed = int(os.environ.get("KILL_SEED", "0"))
    rng = random.Random(seed)
    moments: list[tuple[tuple[str, int], float]] = [(("step", 0), 0.0)]
    moments += [(("step", rng.randint(1, 23)), rng.uniform(0, 0.02)) for _ in range(3)]
    moments += [(("resume", rng.choice((4, 8, 12, 16, 20))), delay) for delay in (0.0, 0.0, rng.uniform(0, 0.01))]
    moments += [(("checkpoint", rng.choice((4, 8, 12, 16, 20, 24))), 0.0) for _ in range(2)]
    moments += [(("checkpoint", rng.choice((4, 8, 12, 16, 20))), rng.uniform(0, 0.03))]  # after 24 the run is over
    died_saving = 0
    for number, (moment, delay) in enumerate(moments):
        folder = tmp_path / str(number)
        folder.mkdir()
        recipe = write_recipe(folder, tiny_base)
        saving = kill_at(recipe, folder / "run", moment, delay)
        died_saving += saving
        print(f"killed at {moment} + {delay * 1000:.1f} ms{', saving' if saving else ''}")
        resumed = sftflow("train", str(recipe), "--resume")
        assert resumed.returncode == 0, (seed, moment, resumed.stderr)
        assert outcome(folder / "run") == whole, (seed, moment, delay)
        assert leftovers(folder / "run") == []
    assert died_saving >= 4


def test_what_killed_writers_left_is_cleared_away(tmp_path: Path) -> None:
    for name in ("step-1", "step-2", ".step-2.old", ".step-3.old", ".step-4.123.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    (tmp_path / ".recipe.yaml.123.tmp").write_text("x")
    (tmp_path / ".else").write_text("x")
    sweep(tmp_path, "step-*", "recipe.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".else", "step-1", "step-2", "step-3"]
    assert (tmp_path / "step-3" / "f").read_text() == ".step-3.old"  # killed between the two renames
    assert (tmp_path / "step-2" / "f").read_text() == "step-2"


def test_a_reader_that_puts_the_old_directory_back_does_not_stop_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftflow.foundation.atomic_io import recover_directory

    target = tmp_path / "checkpoint"
    write_directory(target, lambda d: (d / "f").write_text("old") and None)
    real, calls = Path.rename, []

    def rename(self: Path, to: Path) -> Path:
        done = real(self, to)
        if to.name == ".checkpoint.old" and not calls:
            calls.append(1)
            recover_directory(target)
        return done

    monkeypatch.setattr(Path, "rename", rename)
    write_directory(target, lambda d: (d / "f").write_text("new") and None)
    assert calls and (target / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_the_random_state_is_restored(tiny_base: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    loaded = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        loaded.append(load_recipe(write_recipe(tmp_path / name, tiny_base, dropout=0.2)))
    run_training(loaded[0], Quiet())
    with pytest.raises(Stopped):
        run_training(loaded[1], StopAt(10))
    run_training(loaded[1], Quiet(), resume=True)
    found = outcome(tmp_path / "whole" / "run")
    assert outcome(tmp_path / "stopped" / "run") == found
    assert found["model.safetensors"] != whole["model.safetensors"]  # dropout did something


# ---- SIGTERM and Ctrl-C


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(
    number: int, code: int, tiny_base: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base), tmp_path / "run"
    metrics = out / "metrics.jsonl"

    def send() -> None:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    stopped = run("train", str(recipe))
    sender.join()
    assert stopped.returncode == code, stopped.stderr
    steps = metrics.read_text().count("\n")
    assert steps < 24 and (out / "resume" / f"step-{steps:08d}" / "state.json").is_file()
    assert f"stopped; the state is saved in {out / 'resume'}; --resume goes on" in stopped.stderr
    assert "  stopped by SIG" in (out / "log.txt").read_text().splitlines()[-1]
    resumed = run("train", str(recipe), "--resume")
    assert resumed.returncode == 0 and f"resumed at step {steps} of 24" in resumed.stderr
    found = outcome(out)
    assert {k: found[k] for k in whole if k in found} == {k: whole[k] for k in whole if k in found}
    assert found["metrics.jsonl"] == whole["metrics.jsonl"] and found["checkpoint"] == whole["checkpoint"]


def test_a_signal_before_the_first_step_stops_at_once_and_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "sftflow", "train", str(recipe)], stderr=subprocess.PIPE, text=True
    )
    while not (out / ".lock").exists() and process.poll() is None:
        time.sleep(0.002)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped; nothing had been saved yet" in said and "Traceback" not in said
    assert time.monotonic() - asked < 10
    assert not out.exists()


def test_a_signal_while_the_folder_is_tried_leaves_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, rmdir = write_recipe(tmp_path, tiny_base), Path.rmdir
    sent: list[Path] = []

    def interrupted(folder: Path) -> None:
        if not sent:  # of the trial folder: before it is removed
            sent.append(folder)
            os.kill(os.getpid(), signal.SIGTERM)
        rmdir(folder)

    monkeypatch.setattr(Path, "rmdir", interrupted)
    with pytest.raises(Stopped):
        run_training(load_recipe(recipe), Quiet())
    assert sent and not (tmp_path / "run").exists()


class StopRendering(Quiet):
    def say(self, text: str) -> None:
        if text == "rendering the mixture":
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_rendering(tiny_base: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base), tmp_path / "run"
    with pytest.raises(Stopped) as stopped:
        run_training(load_recipe(recipe), StopRendering())
    assert not stopped.value.saved and not out.exists()
    stopped_run(tmp_path, tiny_base, at=10)
    before = {p: digest(p) for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(Stopped):
        run_training(load_recipe(recipe), StopRendering(), resume=True)
    assert {p: digest(p) for p in out.rglob("*") if p.is_file() and p.name != ".lock"} == before
    run_training(load_recipe(recipe), Quiet(), resume=True)
    assert outcome(out) == whole


def test_a_signal_in_the_last_step_lets_the_training_finish(
    tiny_base: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    recipe = write_recipe(tmp_path, tiny_base)
    with pytest.raises(Stopped):
        run_training(load_recipe(recipe), StopAt(24))
    assert (tmp_path / "run" / "DONE").is_file() and outcome(tmp_path / "run") == whole


def test_a_signal_while_evaluating_stops_at_once_and_resume_finishes(tiny_base: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base, steps=1), tmp_path / "run"
    evaluated = ["--set", "eval={tasks: [spelling, arithmetic, concepts], limit: 100}"]

    def send() -> None:
        while not (out / "DONE").exists():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    stopped = run("train", str(recipe), *evaluated)
    sender.join()
    assert stopped.returncode == 143 and not (out / "eval.json").exists(), stopped.stderr
    assert "stopped; the training itself is finished; --resume goes on" in stopped.stderr
    resumed = run("train", str(recipe), "--resume", "--set", "eval={tasks: [spelling], limit: 2}")
    assert resumed.returncode == 0 and (out / "eval.json").is_file(), resumed.stderr


def test_ctrl_c_twice_stops_at_once_and_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    told: list[int] = []
    with pytest.raises(Stopped) as stopped, Signals(lambda: told.append(1)) as signals, signals.between_steps():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == signal.SIGINT and told == [1]
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.exit_code == 130 and not stopped.value.saved
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


# ---- what has changed since


def test_every_changed_key_is_named_and_harmless_ones_may_change(
    tiny_base: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    recipe, out = stopped_run(tmp_path, tiny_base), tmp_path / "run"
    state = out / "resume" / "step-00000017"
    refused = run("train", str(recipe), "--resume", "--set", "train.lr=0.004", "--set", "train.steps=30")
    assert error_line(refused) == (
        f"error: {state}: the run has changed since this was saved: recipe.train.steps: 24 -> 30,"
        " recipe.train.lr: 0.003 -> 0.004; undo that, or start in a new train.out"
    )
    nested = run("train", str(recipe), "--resume", "--set", "train.schedule.warmup=0.1", "--set", "validation=5")
    line = error_line(nested)
    assert "recipe.validation: 4.0 -> 5.0, " in line and "recipe.train.schedule.warmup: 0.03 -> 0.1;" in line
    free = ["train.save_every=3", "train.keep=1", "eval={tasks: [spelling], limit: 1}", "train.best=last"]
    loaded = load_recipe(recipe, free)
    run_training(loaded, Quiet(), resume=True)
    assert digest(out / "checkpoint" / "model.safetensors") == whole["model.safetensors"]
    assert outcome(out)["metrics.jsonl"] == whole["metrics.jsonl"]


def test_changed_data_tokenizer_and_format_are_named(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    recipe, rows = stopped_run(tmp_path, base, at=5), tmp_path / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("It is 7.", "It is 8.", 1))
    line = error_line(run("train", str(recipe), "--resume"))
    assert f"since this was saved: rows of source 1 ({rows}): " in line and "tokenizer: " not in line
    # The same tokens and the same counts, but another turn is trained on.
    turns = [{"role": r, "content": "one"} for r in ("user", "assistant") * 2]
    for weighted in (1, 3):
        marked = [m | ({"weight": int(i == weighted)} if i % 2 else {}) for i, m in enumerate(turns)]
        rows.write_text(text + json.dumps({"messages": marked}) + "\n")
        if weighted == 1:
            shutil.rmtree(tmp_path / "run")
            with pytest.raises(Stopped):
                run_training(load_recipe(recipe), StopAt(5))
    assert f"rows of source 1 ({rows}): " in error_line(run("train", str(recipe), "--resume"))
    rows.write_text(text)
    shutil.rmtree(tmp_path / "run")
    stopped_run(tmp_path, base, at=5)
    line = error_line(run("train", str(recipe), "--resume", "--set", "format=chatml"))
    assert 'recipe.format: "auto" -> "chatml", ' in line and "chat format: " in line
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = error_line(run("train", str(recipe), "--resume"))
    assert "tokenizer: " in line and "recipe." not in line


# ---- damage


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit of one byte."""
    blob = bytearray(path.read_bytes())
    blob[int(len(blob) * at)] ^= 4
    path.write_bytes(blob)


def test_a_damaged_state_is_named_and_the_advice_works(tiny_base: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    recipe, out = stopped_run(tmp_path, tiny_base), tmp_path / "run"
    newest, older = out / "resume" / "step-00000017", out / "resume" / "step-00000016"
    good = tmp_path / "good"
    shutil.copytree(newest, good)
    damages: list[tuple[str, Callable[[Path], None], str]] = [
        ("model.safetensors", flip, "changed since it was saved: its sha256"),
        ("model.safetensors", Path.unlink, "this file is missing"),
        ("optimizer.safetensors", lambda p: flip(p, 0.99), "changed since it was saved: its sha256"),
        ("optimizer.safetensors", lambda p: os.truncate(p, 1000), "changed since it was saved: its sha256"),
        ("state.json", Path.unlink, "this file is missing"),
        ("state.json", lambda p: os.truncate(p, 100), "damaged: not whole JSON"),
        ("state.json", lambda p: os.truncate(p, 0), "damaged: not whole JSON"),
        ("state.json", lambda p: p.write_bytes(b"\xff\xfe"), "damaged: not whole JSON"),
        ("state.json", lambda p: p.write_text("[]"), "damaged: not a JSON object"),
        (
            "state.json",
            lambda p: p.write_text(p.read_text().replace('"step": 17', '"step": 18')),
            "changed since it was saved: its checksum is not",
        ),
    ]
    for name, damage, fact in damages:
        damage(newest / name)
        line = error_line(run("train", str(recipe), "--resume"))
        assert line.startswith(f"error: {newest / name}: {fact}"), line
        assert line.endswith(f"; remove the folder {newest}; --resume then goes on from {older.name}")
        shutil.rmtree(newest)
        shutil.copytree(good, newest)
    flip(newest / "model.safetensors")
    flip(older / "model.safetensors")
    shutil.rmtree(newest)  # as advised
    line = error_line(run("train", str(recipe), "--resume"))
    assert line.endswith(
        f"; remove the folder {older}; --resume then starts from the beginning (no older state is kept)"
    )
    flip(older / "model.safetensors")  # whole again
    resumed = run("train", str(recipe), "--resume")
    assert resumed.returncode == 0 and "resumed at step 16" in resumed.stderr
    assert outcome(out) == whole


def test_without_any_state_resume_starts_from_the_beginning(
    tiny_base: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    recipe, out = stopped_run(tmp_path, tiny_base), tmp_path / "run"
    for state in (out / "resume").iterdir():
        shutil.rmtree(state)
    resumed = run("train", str(recipe), "--resume")
    assert resumed.returncode == 0 and "resumed at" not in resumed.stderr
    assert outcome(out) == whole


def test_a_log_that_was_cut_short_does_not_break_resume(tiny_base: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    recipe, out = stopped_run(tmp_path, tiny_base), tmp_path / "run"
    for name, end in (("metrics.jsonl", b'{"step": 18, "lo'), ("validation.jsonl", b'7\n\xff\n{"step"')):
        with (out / name).open("ab") as f:
            f.write(end)
    run_training(load_recipe(recipe), Quiet(), resume=True)
    assert outcome(out) == whole


def test_a_new_run_in_a_finished_folder_forgets_the_old_states(tiny_base: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base), tmp_path / "run"
    run_training(load_recipe(recipe), Quiet())
    assert (out / "resume" / "step-00000020").is_dir()
    other = load_recipe(recipe, ["train.lr=0.001"])
    with pytest.raises(Stopped):
        run_training(other, StopAt(5), overwrite=True)
    assert not (out / "checkpoint").exists() or json.loads((out / "ledger.json").read_text())["checkpoint"]["step"] == 4
    assert sorted(p.name for p in (out / "resume").iterdir()) == ["step-00000004", "step-00000005"]
    assert (out / "metrics.jsonl").read_text().count("\n") == 5
    run_training(other, Quiet(), resume=True)
    assert (out / "DONE").is_file()


def test_a_damaged_checkpoint_names_the_file(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    from sftflow.checkpoint import load_assistant, open_renderer, resolve

    recipe, out = write_recipe(tmp_path, tiny_base, steps=1), tmp_path / "run"
    real = PreTrainedModel.save_pretrained
    sharded = lambda self, *args, **kwargs: real(self, *args, **{**kwargs, "max_shard_size": "60KB"})  # noqa: E731
    for kind in ("one file", "shards"):
        if kind == "shards":
            shutil.rmtree(out)
            monkeypatch.setattr(PreTrainedModel, "save_pretrained", sharded)
        run_training(load_recipe(recipe), Quiet())
        load_assistant(str(out))
        directory = out / "checkpoint"
        names = sorted(p.name for p in directory.iterdir())
        assert {"config.json", "generation_config.json", "tokenizer.json", "sftflow.json"} <= set(names)
        assert ("model.safetensors.index.json" in names) == (kind == "shards")
        assert sum(n.endswith(".safetensors") for n in names) > 1 or kind == "one file"
        for name in names:
            blob = (directory / name).read_bytes()
            flip(directory / name)
            with pytest.raises(CheckpointError) as error:
                load_assistant(str(out))
            assert name in error.value.place, error.value
            assert error.value.remedy == "restore it, or copy the checkpoint again"
            if not name.endswith(".safetensors"):
                with pytest.raises(CheckpointError, match=name):
                    open_renderer(resolve(str(out)), "auto")
            if name != "sftflow.json":  # without it, it is a checkpoint of somebody else's
                (directory / name).unlink()
                with pytest.raises(CheckpointError, match=f"{name}: this file is missing"):
                    load_assistant(str(out))
            (directory / name).write_bytes(blob)
        load_assistant(str(out))


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB; a skip where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here (needs root)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill_up(place: Path, leave: int = 0) -> None:
    """A file that takes all of the space but `leave` bytes."""
    free = os.statvfs(place)
    with (place / "ballast").open("ab") as f:
        f.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))


class FillAt(Quiet):
    def __init__(self, step: int, place: Path, leave: int) -> None:
        self.at, self.place, self.leave = step, place, leave

    def step(self, log: Any, total: int) -> None:
        if log.step == self.at:
            fill_up(self.place, self.leave)


@pytest.mark.parametrize("leave", [0, 8 << 10, 100 << 10, 170 << 10, 300 << 10])
def test_a_full_disk_leaves_the_previous_state_whole(
    leave: int, small_disk: Path, tiny_base: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    """The space ends in the logs, in the checkpoint's weights (twice), behind them, and in the state."""
    from sftflow.checkpoint import load_assistant

    out = small_disk / "run"
    recipe = write_recipe(tmp_path, tiny_base, out=str(out))
    with pytest.raises(RunError) as error:
        run_training(load_recipe(recipe), FillAt(9, small_disk, leave))
    assert str(error.value) == f"{out}: cannot write (No space left on device); free space; --resume goes on"
    assert error.value.exit_code == 3
    assert sorted(p.name for p in (out / "resume").iterdir()) == ["step-00000004", "step-00000008"]
    load_assistant(str(out))
    # Still full: the same line, and still nothing is lost.
    fill_up(small_disk)
    assert "cannot write (No space left on device)" in error_line(run("train", str(recipe), "--resume"), 3)
    grown = subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], capture_output=True)
    assert grown.returncode == 0
    resumed = run("train", str(recipe), "--resume")
    assert resumed.returncode == 0 and "resumed at step 8 of 24" in resumed.stderr, resumed.stderr
    assert outcome(out) == whole and leftovers(out) == []


def test_a_disk_too_small_from_the_start(small_disk: Path, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, out=str(small_disk / "run"))
    fill_up(small_disk, leave=600 << 10)
    done = sftflow("train", str(recipe))
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"error: {small_disk / 'run'}: cannot write (No space left on device); free space; --resume goes on"
    )


# ---- two at once


def test_a_second_trainer_is_refused_and_a_killed_one_leaves_no_lock(tiny_base: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base, steps=4000), tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-m", "sftflow", "train", str(recipe)], stderr=subprocess.DEVNULL)
    try:
        while not (out / "resume" / "step-00000004").is_dir() and first.poll() is None:
            time.sleep(0.01)
        said = f"error: {out}: process {first.pid} is at work in it; wait for it, stop it, or name another folder"
        assert error_line(run("train", str(recipe))) == said
        assert error_line(run("train", str(recipe), "--resume")) == said
        assert error_line(run("base", str(recipe), "--out", str(out))) == said
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    with pytest.raises(Stopped):
        run_training(load_recipe(recipe), StopRendering(), resume=True)  # the lock went with the process


def test_the_lock_is_given_back_and_leaves_no_empty_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with Lock(folder):
        assert (folder / ".lock").read_text() == str(os.getpid())
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} is at work in it"):
            Lock(folder)
    assert not folder.exists()
    with Lock(folder):
        (folder / "kept").touch()
    assert (folder / "kept").exists()
    Lock(folder).release()


def test_a_second_demo_does_not_clear_the_first(tmp_path: Path) -> None:
    (tmp_path / ".demo").touch()
    (tmp_path / "kept").touch()
    with Lock(tmp_path):
        assert f"process {os.getpid()} is at work in it" in error_line(run("demo", "--out", str(tmp_path)))
    assert (tmp_path / "kept").exists()


# ---- inputs at the edge


def edge_recipe(folder: Path, base: Path, rows: list[Any], **train: Any) -> Path:
    recipe = write_recipe(folder, base, **{"steps": 3, **train})
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return recipe


def test_a_base_with_nan_weights_fails_before_training(tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    line = error_line(run("train", str(write_recipe(tmp_path, base))), 2)
    assert line.startswith(f"error: {base}: its weights are not finite (model.norm.weight); ")
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    recipe, out = write_recipe(tmp_path, tiny_base, save_every=1, keep=9, optimizer="adamw", clip=0), tmp_path / "run"
    diverging = ["--set", "train.lr=1e30", "--set", "train.best=last"]
    line = error_line(run("train", str(recipe), *diverging), 3)
    good = json.loads((out / "checkpoint" / "sftflow.json").read_text())["step"]
    assert "not finite 3 steps in a row" in line
    assert line.endswith(
        "; lower train.lr in a new train.out, or look at the rows of these steps; good weights: "
        f"{out / 'checkpoint'} holds those of step {good}"
    )
    assert all(bool(t.isfinite().all()) for t in load_file(out / "checkpoint" / "model.safetensors").values())
    skipped = [json.loads(row)["step"] for row in (out / "metrics.jsonl").open() if json.loads(row)["skipped"]]
    assert skipped[-3:] == [skipped[-1] - 2, skipped[-1] - 1, skipped[-1]], "the step that ended the run is logged, too"
    states = [int(p.name.removeprefix("step-")) for p in (out / "resume").iterdir()]
    assert skipped and states and not set(skipped) & set(states)
    assert "not finite 3 steps in a row" in error_line(run("train", str(recipe), *diverging, "--resume"), 3)
    assert "an unfinished run is in it" in error_line(run("train", str(recipe)))


def test_one_conversation_is_enough(tiny_base: Path, tmp_path: Path) -> None:
    recipe, out = edge_recipe(tmp_path, tiny_base, [{"prompt": "hi", "completion": "yo"}]), tmp_path / "run"
    done = run("train", str(recipe))
    assert done.returncode == 0, done.stderr
    ledger = json.loads((out / "ledger.json").read_text())
    assert (ledger["rows"], ledger["validation_rows"], ledger["packed_rows"]) == (1, 0, 1)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_no_conversation_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    recipe = edge_recipe(tmp_path, tiny_base, [])
    assert error_line(run("train", str(recipe))) == (
        f"error: {tmp_path / 'rows.jsonl'}: no rows in it; give a file with conversations"
    )
    (tmp_path / "gsm8k.jsonl").write_text("")
    data = json.loads(recipe.read_text())
    data["mixture"] = [{"source": "gsm8k", "path": "gsm8k.jsonl"}]
    recipe.write_text(json.dumps(data))
    assert "gsm8k.jsonl" in error_line(run("train", str(recipe)))
    assert not (tmp_path / "run").exists()


def test_a_conversation_longer_than_the_row_is_cut_or_dropped_and_counted(tiny_base: Path, tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is fine."}]
    rows: list[Any] = [{"messages": turn}, {"messages": turn * 20}, {"prompt": "word " * 90, "completion": "yo"}]
    for overlong, cut, dropped in (("cut", 1, 1), ("drop", 0, 2)):
        recipe = edge_recipe(tmp_path, tiny_base, rows, overlong=overlong)
        done = run("train", str(recipe), "--overwrite", "--set", "max_dropped=1")
        assert done.returncode == 0, done.stderr
        source = json.loads((tmp_path / "run" / "ledger.json").read_text())["sources"][0]
        assert (source["cut"], source["dropped"]) == (cut, dropped)
        assert source["dropped_why"] == {"longer than max_length": dropped}
    recipe = edge_recipe(tmp_path, tiny_base, rows[1:], overlong="drop")
    assert "2 of 2 rows are longer than max_length 64 and" in error_line(run("train", str(recipe), "--overwrite"))
    all_lost = run("train", str(recipe), "--overwrite", "--set", "max_dropped=1")
    assert "no row is left to train on (2 are longer than max_length); raise train.max_length, " in error_line(all_lost)


def test_rows_without_a_reply(tiny_base: Path, tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": "a"}]}
    line = error_line(run("train", str(edge_recipe(tmp_path, tiny_base, [silent, silent]))))
    assert line.startswith(f"error: {tmp_path / 'rows.jsonl'}:1: no assistant turn to learn from; ")
    skipped = run("train", str(tmp_path / "recipe.yaml"), "--set", "on_bad_row=skip")
    assert "2 of 2 rows are bad" in error_line(skipped)


def test_no_row_that_is_taught_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    line = error_line(run("train", str(edge_recipe(tmp_path, tiny_base, [row, row]))))
    assert line.startswith(
        "error: mixture: no row is left to train on (2 are not taught: weight 0); give their replies "
    )
    assert not (tmp_path / "run").exists()


def test_steps_smaller_than_a_row_are_a_recipe_error(tiny_base: Path, tmp_path: Path) -> None:
    line = error_line(run("train", str(write_recipe(tmp_path, tiny_base, tokens_per_step=32))))
    assert "tokens_per_step 32 is less than max_length 64" in line


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon", "micro_tokens": 64},
        pytest.param({"optimizer": "adamw", "compile": True}, marks=pytest.mark.slow),
    ],
    ids=["adamw", "muon-accumulated", "compiled"],
)
def test_bf16_resumes_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    """Working weights are derived from the saved ones, and compiled code does not hang on the batch it was made for."""
    from helpers.training import shared_rows, spec
    from sftflow.foundation.runtime import Runtime
    from sftflow.pretraining.pretrain import BaseSpec, build_model
    from sftflow.training.batch_plan import RowPlan
    from sftflow.training.resume import load_state, save_state
    from sftflow.training.trainer import Trainer

    def trainer() -> Trainer:
        model = build_model(BaseSpec(params="0.1M", context=64), 320, 0)
        s = spec(steps=6, tokens_per_step=256, **settings)
        runtime = Runtime(device="cpu", precision="bf16", reason="test")
        return Trainer(model, RowPlan(shared_rows(), s), s, runtime)

    whole = trainer()
    losses = [whole.train_step().loss for _ in range(6)]
    first = trainer()
    for _ in range(3):
        first.train_step()
    save_state(tmp_path, first, {"data": "a"}, {}, keep=1)
    torch._dynamo.reset()  # as in a process of its own
    second = trainer()
    load_state(tmp_path / "step-00000003", second, {"data": "a"})
    assert [second.train_step().loss for _ in range(3)] == losses[3:]
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
