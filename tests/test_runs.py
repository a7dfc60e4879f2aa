"""What a run's folder keeps: replaced only when asked, gone on with only as the same, saved at bad steps, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sftflow as sf
from helpers.runs import Quiet, digest, error_line, run, write_recipe
from sftflow.data.sources import labels_of
from sftflow.foundation.errors import RecipeError, RunError
from sftflow.recipe import SourceEntry, load_recipe
from sftflow.training.identity import changed
from sftflow.training.resume import saved_states
from sftflow.training.run import run_training
from sftflow.training.signals import Signals, Stopped
from sftflow.training.trainer import Trainer

Damage = Callable[[Trainer], bool]


class StopAfter(Quiet):
    """Asks the run to stop after a step, as SIGTERM would."""

    def __init__(self, step: int, signals: Signals) -> None:
        self.at, self.signals = step, signals

    def step(self, log: Any, total: int) -> None:
        if log.step == self.at:
            self.signals.asked = 15


def stopped(recipe: Path, at: int = 3) -> None:
    """Train to a step; the state after it is saved."""
    with Signals() as signals, pytest.raises(Stopped):
        run_training(load_recipe(recipe), StopAfter(at, signals), signals=signals)


def files_of(folder: Path) -> dict[str, str]:
    found = {str(p.relative_to(folder)): digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: of for name, of in found.items() if not name.endswith(".lock")}


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of its own, data, and a recipe of six steps of which three are trained."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_base, folder / "base")
    stopped(write_recipe(folder, folder / "base", steps=6, save_every=2))
    return folder


HERE = ["--set", "base=base", "--set", "train.out=run"]  # of a copy of the project


# ---- replaced only when asked


def test_a_finished_run_is_replaced_only_when_asked(tiny_base: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base, steps=2), tmp_path / "run"
    run_training(load_recipe(recipe), Quiet())
    (out / "eval.json").write_text("{}")
    before = files_of(out)
    for more in ([], ["--set", "train.lr=0.001"]):
        assert error_line(run("train", str(recipe), *more)) == (
            f"error: {out}: a finished run is in it (checkpoint, eval.json); "
            "name another folder, or start anew with --overwrite"
        )
    assert "give one of the two" in error_line(run("train", str(recipe), "--overwrite", "--resume"))
    with pytest.raises(RecipeError, match="give one of the two"):
        sf.train(recipe=recipe, overwrite=True, resume=True)
    # What cannot start replaces nothing.
    broken = ["train.max_length=4000", "base=nowhere/at/all", "mixture=[{source: missing.jsonl}]", "eval={tasks: [no]}"]
    for change in broken:
        assert run("train", str(recipe), "--overwrite", "--set", change).returncode == 2, change
        assert files_of(out) == before, change
    assert run("train", str(recipe), "--overwrite", "--set", "train.lr=0.001").returncode == 0
    assert not (out / "eval.json").exists() and files_of(out)["recipe.yaml"] != before["recipe.yaml"]


def test_what_else_is_in_a_folder_is_not_destroyed(project: Path, tiny_base: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base, steps=1), tmp_path / "run"
    shutil.copytree(tiny_base, out / "checkpoint")  # somebody else's, or one of `sftflow base`
    for flag in ([], ["--resume"]):
        assert "a finished run is in it (checkpoint); " in error_line(run("train", str(recipe), *flag))
    shutil.rmtree(out)
    out.mkdir()
    (out / "compare.json").write_text("{}")
    assert "results are in it (compare.json); " in error_line(run("train", str(recipe)))
    shutil.rmtree(out)
    shutil.copytree(project / "run", out)
    line = "an unfinished run is in it; continue it with --resume, or start anew with --overwrite"
    assert line in error_line(run("train", str(recipe)))
    assert "an unfinished run is in it" in error_line(run("base", str(recipe), "--out", str(out), "--resume"))
    shutil.rmtree(out / "resume")  # killed between its first checkpoint and its first state
    assert line in error_line(run("train", str(recipe)))
    assert run("train", str(recipe), "--overwrite").returncode == 0
    own = ["--set", f"base={out}", "--overwrite"]
    assert "the base itself is in it" in error_line(run("train", str(recipe), *own))


# ---- the same, by what is in it


def test_a_run_whose_folder_was_moved_goes_on(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "moved", ignore=shutil.ignore_patterns(".lock"))
    (tmp_path / "data").mkdir()
    shutil.move(tmp_path / "moved" / "rows.jsonl", tmp_path / "data")
    mixture = f"mixture=[{{source: {tmp_path / 'data' / 'rows.jsonl'}}}]"
    done = run("train", "recipe.yaml", "--resume", *HERE, "--set", mixture, cwd=tmp_path / "moved")
    assert done.returncode == 0 and "resumed at step 3 of 6" in done.stderr, done.stderr
    shutil.move(tmp_path / "moved", tmp_path / "again")  # and so does a finished one
    done = run("train", "recipe.yaml", "--resume", *HERE, "--set", mixture, cwd=tmp_path / "again")
    assert done.returncode == 0 and "finished; nothing to resume" in done.stderr, done.stderr


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))


def scale_a_weight(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda b: edit(b / "config.json", rms_norm_eps=0.25), "config.json: rms_norm_eps: 1e-06 -> 0.25;"),
        (lambda b: edit(b / "config.json", hidden_act="relu"), 'config.json: hidden_act: "silu" -> "relu";'),
        (lambda b: edit(b / "config.json", rope_theta=99.0, rope_parameters=None), "rope_parameters.rope_theta: "),
        (lambda b: edit(b / "generation_config.json", eos_token_id=7), "generation_config.json: eos_token_id: "),
        (lambda b: edit(b / "tokenizer_config.json", eos_token="<|other|>"), "special tokens: "),
        (scale_a_weight, "weights: "),
        (lambda b: edit(b / "config.json", _name_or_path="x", transformers_version="9", use_cache=False), None),
        (lambda b: edit(b / "config.json", dtype=None, torch_dtype="float32"), None),
    ],
    ids=["eps", "activation", "rope", "generation", "eos", "weights", "names", "dtype"],
)
def test_a_changed_base_is_told_by_its_key(project: Path, tmp_path: Path, change: Any, told: str | None) -> None:
    shutil.copytree(project, tmp_path / "p", ignore=shutil.ignore_patterns(".lock"))
    change(tmp_path / "p" / "base")
    (tmp_path / "p" / "base" / "sftflow.json").unlink(missing_ok=True)
    result = run("train", "recipe.yaml", "--resume", *HERE, cwd=tmp_path / "p")
    if told is None:
        assert result.returncode == 0, result.stderr
    else:
        line = error_line(result)
        assert "step-00000003: the " in line and told in line, line
        assert "the base changed: " in line or told == "special tokens: "


def test_a_finished_run_of_another_recipe_is_told(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "p", ignore=shutil.ignore_patterns(".lock"))
    recipe = tmp_path / "p" / "recipe.yaml"
    (tmp_path / "p").joinpath("rows.jsonl").write_bytes((project / "rows.jsonl").read_bytes())
    at = ["--set", f"train.out={tmp_path / 'p' / 'run'}"]
    assert run("train", str(recipe), *at, "--resume").returncode == 0
    out = tmp_path / "p" / "run"
    before = files_of(out)
    for earlier in (False, True):
        if earlier:  # what a version wrote that kept no identity
            (out / "DONE").write_text("6 steps\n")
        line = error_line(run("train", str(recipe), *at, "--resume", "--set", "train.lr=0.004"))
        assert f"{out}: the finished run in it is another: recipe.train.lr: 0.003 -> 0.004; undo that, " in line
        assert run("train", str(recipe), *at, "--resume", "--set", "train.keep=7").returncode == 0
    assert {**files_of(out), "DONE": ""} == {**before, "DONE": ""}


def test_what_a_finished_run_is_of_is_compared_by_content(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    shutil.copytree(project, folder, ignore=shutil.ignore_patterns(".lock"))
    again = ["train", "recipe.yaml", *HERE, "--set", "base=./base", "--set", "train.precision=auto", "--resume"]
    assert run(*again[:-1], "--overwrite", cwd=folder).returncode == 0
    before = files_of(folder / "run")
    assert "finished; nothing to resume" in run(*again, cwd=folder).stderr
    rows, config = folder / "rows.jsonl", folder / "base" / "config.json"
    kept = {path: path.read_bytes() for path in (rows, config)}
    rows.write_bytes(kept[rows].replace(b"It is 3.", b"It is four."))
    assert "run: the finished run in it is another: rows of source 1 (" in error_line(run(*again, cwd=folder))
    rows.write_bytes(kept[rows])
    edit(config, rms_norm_eps=0.25)
    assert "run: the base changed: config.json: rms_norm_eps: 1e-06 -> 0.25; " in error_line(run(*again, cwd=folder))
    config.write_bytes(kept[config])
    done = folder / "run" / "DONE"
    elsewhere = json.loads(done.read_text())
    elsewhere["identity"]["recipe.train.precision"] = '"bf16"'  # what `auto` was on another machine
    done.write_text(json.dumps(elsewhere))
    assert "finished; nothing to resume" in run(*again, cwd=folder).stderr
    for gone in (rows, folder / "base"):
        gone.rename(folder / "away")
        result = run(*again, cwd=folder)
        assert result.returncode == 0 and "finished; nothing to resume" in result.stderr
        assert f"compared with nothing: {gone} is no longer there" in result.stderr
        (folder / "away").rename(gone)
    assert {**files_of(folder / "run"), "DONE": ""} == {**before, "DONE": ""}


def test_what_an_earlier_version_recorded_still_counts(project: Path) -> None:
    """Its paths do not, and what it did not know does not, either."""
    (state, *_) = saved_states(project / "run" / "resume")
    now = json.loads((state / "state.json").read_text())["identity"]
    was = {key: value for key, value in now.items() if not key.startswith("base: ")}
    was |= {"recipe.base": '"/a/base"', "recipe.mixture[0].source": '"/a/rows.jsonl"', "recipe.mixture[0].path": "null"}
    was["rows of source 1 (/a/rows.jsonl)"] = was.pop(next(key for key in was if key.startswith("rows of")))
    was.pop("recipe.train.clip")
    assert changed(was, now) == []
    assert changed(was | {"recipe.train.lr": "1"}, now) == ["recipe.train.lr: 1 -> 0.003"]
    assert changed(was, now | {"recipe.train.clip": "0.5"}) == ["recipe.train.clip: absent -> 0.5"]
    assert changed(was, now | {"rows of source 2 (b)": "ab"}) == ["rows of source 2 (b): absent -> ab"]
    assert changed(now, now | {"base: config.json: new_in_the_library": "1"}) == []


# ---- what sources are called


@pytest.mark.parametrize(
    ("entries", "labels"),
    [
        (["/d/a/train.jsonl", "/d/b/train.jsonl", "spelling"], ["a/train", "b/train", "spelling"]),
        (["/d/x/a/t.jsonl", "/d/y/a/t.jsonl"], ["x/a/t", "y/a/t"]),
        (["/d/t.jsonl", "/d/t.parquet"], ["t.jsonl", "t.parquet"]),
        (["/d/t.jsonl", "/d/more/t.jsonl"], ["t", "more/t"]),  # wherever /d is moved to
        (["spelling", "/d/spelling.jsonl", "spelling"], ["spelling", "spelling.jsonl", "spelling-2"]),
        (["/d/c.jsonl", "/d/c.jsonl", "/d/c-2.jsonl"], ["c", "c-3", "c-2"]),
        ([{"source": "/x/a.jsonl", "name": "mine"}, "/y/mine.jsonl"], ["mine", "mine.jsonl"]),
        (["/b/c.jsonl", "/b/c.jsonl", {"source": "/a/x.jsonl", "name": "c-2"}], ["c", "c-3", "c-2"]),
        ([{"source": "/m/1/rows.jsonl", "place": "rows"}, {"source": "/m/2/rows.jsonl", "place": "rows"}],
         ["rows", "rows-2"]),
        (["hub:a/x", "hub:b/x"], ["hub:a/x", "hub:b/x"]),
        (["/d/one.jsonl", "two.jsonl", {"source": "spelling", "name": "three"}], ["one", "two", "three"]),
    ],
)  # fmt: skip
def test_sources_are_told_apart(entries: list[Any], labels: list[str]) -> None:
    made = [SourceEntry(**({"source": e} if isinstance(e, str) else e)) for e in entries]
    assert labels_of(made) == labels
    assert labels_of(list(reversed(made)))[-1] in labels


def test_two_files_of_one_name_keep_their_own_losses(tiny_base: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_base, steps=1)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    path.write_text(
        path.read_text().replace('{"source": "rows.jsonl"}', '{"source": "a/rows.jsonl"}, {"source": "b/rows.jsonl"}')
    )
    assert run("train", str(path)).returncode == 0
    out, names = tmp_path / "run", ["a/rows", "b/rows"]
    ledger, kept = json.loads((out / "ledger.json").read_text()), load_recipe(out / "recipe.yaml")
    assert [source["name"] for source in ledger["sources"]] == names == labels_of(kept.mixture)
    (row,) = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    validation = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert list(row["source_loss"]) == names and all(list(v["sources"]) == names for v in validation)
    assert {json.loads(line)["source"] for line in (out / "held_out.jsonl").read_text().splitlines()} == set(names)
    named = path.read_text().replace('rows.jsonl"}', 'rows.jsonl", "name": "mine"}')
    path.write_text(named)
    assert "mixture: two sources have the name 'mine'" in error_line(run("train", str(path), "--overwrite"))


# ---- which step is kept


def test_the_kept_step_is_named_in_ledger_and_at_the_end(tiny_base: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base, steps=4, save_every=1, lr=0.5), tmp_path / "run"
    done = run("train", str(recipe))
    losses = {row["step"]: row["loss"] for row in map(json.loads, (out / "validation.jsonl").open()) if row["step"]}
    best = min(losses, key=losses.__getitem__)
    assert best < 4, "a rate at which it soon gets worse"
    kept = json.loads((out / "ledger.json").read_text())["checkpoint"]
    assert kept == {"step": best, "of": 4, "validation_loss": losses[best], "chosen_by": "validation_loss"}
    assert json.loads((out / "checkpoint" / "sftflow.json").read_text())["step"] == best
    assert f"kept        step {best} of 4, of the lowest held-out loss ({losses[best]:.3f})\n" in done.stderr
    done = run("train", str(recipe), "--overwrite", "--set", "train.best=last")
    assert "kept        step 4 of 4, the last\n" in done.stderr


# ---- steps that are not finite


@pytest.fixture
def bad_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss of these steps NaN, or that of the held-out rows after them."""
    real = Trainer.loss

    def spoil(*steps: int, held_out: tuple[int, ...] = ()) -> None:
        def loss(self: Trainer, batch: Any, scale: float | None = None) -> Any:
            found = real(self, batch, scale)
            bad = self.step in held_out if scale is None else self.step + 1 in steps
            return found * float("nan") if bad else found

        monkeypatch.setattr(Trainer, "loss", loss)

    return spoil


def test_a_bad_step_where_a_checkpoint_is_due_loses_nothing(
    tiny_base: Path, tmp_path: Path, bad_at: Callable[..., None]
) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base, steps=8, save_every=3, keep=9), tmp_path / "run"
    bad_at(3, 5, 6, 8)
    run_training(load_recipe(recipe, ["validation=0"]), Quiet())
    assert [int(p.name[5:]) for p in saved_states(out / "resume")] == [3, 6]
    assert json.loads((out / "checkpoint" / "sftflow.json").read_text())["step"] == 8
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["skipped"] and row["loss"] is None] == [3, 5, 6, 8]
    bad_at(1)
    with pytest.raises(RunError, match="no step has changed the weights"):  # nothing was learnt: no checkpoint
        run_training(load_recipe(recipe, ["validation=0", "train.steps=1"]), Quiet(), overwrite=True)


def test_a_validation_loss_that_is_not_finite_is_the_worst_one(
    tiny_base: Path, tmp_path: Path, bad_at: Callable[..., None]
) -> None:
    recipe, out = write_recipe(tmp_path, tiny_base, steps=6, save_every=2, keep=9), tmp_path / "run"
    for best, held_out, kept in (
        ("validation_loss", (2, 4, 6), 6),
        ("validation_loss", (2,), 6),
        ("last", (6,), 4),
    ):
        bad_at(held_out=held_out)
        done = run("train", str(recipe), "--overwrite", "--set", f"train.best={best}")
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "checkpoint" / "sftflow.json").read_text())["step"] == kept
        assert [int(p.name[5:]) for p in saved_states(out / "resume")] == [2, 4]
        rows = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["loss"] is None] == list(held_out)
        assert f"kept        step {kept} of 6, " in done.stderr


def test_a_state_that_repeats_the_one_before_is_not_saved(
    tiny_base: Path, tmp_path: Path, bad_at: Callable[..., None]
) -> None:
    """With `keep: 2`, it would drop an older one whose weights are others."""
    recipe, out = write_recipe(tmp_path, tiny_base, steps=6, save_every=1, keep=2), tmp_path / "run"
    bad_at(4, 5, 6)
    done = run("train", str(recipe), "--set", "validation=0")
    assert "step 6: loss or gradient not finite 3 steps in a row" in error_line(done, 3)
    assert [line.split(":")[0] for line in done.stderr.splitlines() if "update skipped" in line] == [
        "step 4", "step 5", "step 6"
    ]  # fmt: skip
    assert [int(p.name[5:]) for p in saved_states(out / "resume")] == [2, 3]
    assert json.loads((out / "checkpoint" / "sftflow.json").read_text())["step"] == 3
