"""What a recipe decides about training: auto values, learning rates by group, warm start, training unpacked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.runs import Quiet, digest, write_recipe
from sftflow.checkpoint import resolve, stored_dtype
from sftflow.foundation.errors import CheckpointError, RecipeError
from sftflow.foundation.runtime import Runtime
from sftflow.recipe import Recipe, load_recipe, parse_recipe, to_yaml
from sftflow.training.run import run_training
from sftflow.training.settings import decide_compile, resolve_recipe
from sftflow.training.trainer import Trainer

CPU = Runtime(device="cpu", precision="fp32", reason="test")


def train(folder: Path, base: Path, **settings: Any) -> Path:
    folder.mkdir()
    run_training(load_recipe(write_recipe(folder, base, **settings)), Quiet())
    return folder / "run"


def recipe(**settings: Any) -> Recipe:
    return parse_recipe({"mixture": [{"source": "spelling"}], "train": settings}, "test")


def test_micro_tokens_never_cut_a_row_and_never_pass_the_step() -> None:
    for n_parameters in (3_000_000, 135_000_000):
        for max_length, per_step in ((512, 8192), (4096, 8192), (64, 64)):
            asked = recipe(max_length=max_length, tokens_per_step=per_step)
            micro = resolve_recipe(asked, CPU, n_parameters)[0].train.micro_tokens
            assert micro is not None and max_length <= micro <= per_step


def test_compiling_is_decided_by_work_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftflow.training.settings.shutil.which", lambda name: f"/usr/bin/{name}")
    assert decide_compile(recipe(), CPU, 3_000_000, 200)[0].train.compile is False
    assert decide_compile(recipe(), CPU, 135_000_000, 200)[0].train.compile is True
    assert decide_compile(recipe(compile=False), CPU, 135_000_000, 200)[0].train.compile is False
    monkeypatch.setattr("sftflow.training.settings.shutil.which", lambda _: None)
    assert decide_compile(recipe(), CPU, 135_000_000, 200)[0].train.compile is False
    with pytest.raises(RecipeError, match="no C\\+\\+ compiler"):
        decide_compile(recipe(compile=True), CPU, 135_000_000, 200)


def test_shard_no_is_a_word_though_yaml_reads_a_boolean(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mixture: [{source: spelling}]\ntrain: {shard: no}")
    assert load_recipe(path).train.shard == load_recipe(path, ["train.shard=no"]).train.shard == "no"
    path.write_text(to_yaml(load_recipe(path)))
    assert load_recipe(path).train.shard == "no"


def test_a_group_of_rate_zero_stays_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "a", tiny_base, steps=3, optimizer="adamw", lr_scale={"embeddings": 0.0})
    before, after = load_file(tiny_base / "model.safetensors"), load_file(run / "checkpoint" / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name][: len(before[name])].float(), before[name].float())
    moved = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after[moved].float(), before[moved].float())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_warm_start_takes_over_the_moments(
    optimizer: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(tmp_path / "first", tiny_base, steps=9, optimizer=optimizer)
    saved = load_file(sorted((first / "resume").glob("step-*"))[-1] / "optimizer.safetensors")
    seen: dict[str, torch.Tensor] = {}
    step = Trainer.train_step

    def first_step(trainer: Trainer) -> Any:
        for number, each in enumerate(trainer.optimizers):
            for index, state in each.state_dict()["state"].items():
                seen.update({f"{number}/{index}/{k}": torch.as_tensor(v).clone() for k, v in state.items()})
        monkeypatch.setattr(Trainer, "train_step", step)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", first_step)
    warm = train(tmp_path / "warm", first, steps=3, optimizer=optimizer, warm_start=True)
    del saved["rng"]
    assert seen.keys() == saved.keys() and all(torch.equal(seen[k], saved[k]) for k in saved)
    cold = train(tmp_path / "cold", first, steps=3, optimizer=optimizer)
    name = "checkpoint/model.safetensors"
    assert digest(warm / name) != digest(cold / name)


def test_warm_start_from_nothing_or_another_optimizer_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no optimizer state beside the base"):
        train(tmp_path / "a", tiny_base, warm_start=True)
    first = train(tmp_path / "first", tiny_base, steps=5, optimizer="adamw")
    with pytest.raises(CheckpointError, match="another optimizer or model"):
        train(tmp_path / "b", first, optimizer="muon", warm_start=True)


def test_unpacked_training_gives_the_same_weights(tiny_base: Path, tmp_path: Path) -> None:
    weights = []
    for packing in (True, False):
        run = train(tmp_path / str(packing), tiny_base, steps=4, optimizer="adamw", packing=packing)
        weights.append(load_file(run / "checkpoint" / "model.safetensors"))
    assert all(torch.allclose(weights[0][k].float(), weights[1][k].float(), atol=1e-4) for k in weights[0])


def test_the_resolved_recipe_tells_what_was_decided(tiny_base: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "a", tiny_base, steps=2, micro_tokens=None, lr="auto")
    resolved = load_recipe(run / "recipe.yaml").train
    assert resolved.compile is False and resolved.micro_tokens == 512 and resolved.lr == 8e-3
    notes = json.loads((run / "checkpoint" / "sftflow.json").read_text())["notes"]
    assert "not worth it" in notes["compile"] and notes["precision"] == "asked for"


def test_the_checkpoint_is_stored_as_the_base_s_files_are(tiny_base: Path, tmp_path: Path) -> None:
    """Whatever its config.json says."""
    assert stored_dtype(resolve(str(tiny_base))) == torch.float32
    shutil.copytree(tiny_base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    for dtype in (torch.bfloat16, torch.float16):
        weights = {k: v.to(torch.float32 if "norm" in k else dtype) for k, v in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
        assert stored_dtype(resolve(str(tmp_path / "base"))) == dtype
