"""AdamW with moments in 8 bits beside AdamW itself: what it follows, what it holds, what is saved of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.training import FP32, shared_rows, spec
from sftflow.foundation.errors import RecipeError
from sftflow.pretraining.pretrain import BaseSpec, build_model
from sftflow.recipe import LrScale, parse_recipe
from sftflow.training import settings
from sftflow.training.batch_plan import RowPlan
from sftflow.training.resume import load_state, read_optimizers, save_state
from sftflow.training.settings import require_optimizer
from sftflow.training.trainer import Trainer

needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao ([adamw8bit])")


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """The same step, operation by operation: its arithmetic is what is tested, and it need not be compiled for that."""
    with torch.compiler.set_stance("force_eager"):
        yield


def trainer(optimizer: str = "adamw8bit", **changes: Any) -> Trainer:
    """0.7M parameters: matrices on both sides of 4,096 numbers, some of them no multiple of 256."""
    model = build_model(BaseSpec(params="1M", context=64), 324, 0)
    train = spec(optimizer=optimizer, **changes)
    return Trainer(model, RowPlan(shared_rows(), train), train, FP32)


def weights(of: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in of.model.named_parameters()}


def test_it_is_refused_where_it_cannot_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r"train.optimizer: .* is not installed; pip install 'sftflow\[adamw8bit\]', or"
    ):
        require_optimizer("adamw8bit", "cpu")
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(RecipeError, match="cannot work here: not for mps; set adamw"):
        require_optimizer("adamw8bit", "mps")
    monkeypatch.setattr(settings.shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match=r"cannot work here: no C\+\+ compiler; install it, or set adamw"):
        require_optimizer("adamw8bit", "cpu")
    require_optimizer("adamw", "mps")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"warm_start": True}, "warm_start takes over no moments in 8 bits; set warm_start: false"),
        ({"shard": "full"}, "would hang on the number of processes; set optimizer: adamw, whose "),
    ],
)
def test_what_its_moments_do_not_allow(setting: dict[str, Any], told: str) -> None:
    asked = {"mixture": [{"source": "spelling"}], "train": {"optimizer": "adamw8bit", **setting}}
    with pytest.raises(RecipeError, match=told):
        parse_recipe(asked, "r.yaml")


@pytest.mark.slow
@needs_torchao
def test_the_first_step_is_adamws(uncompiled: None) -> None:
    """Moments are rounded after they were used; rates by group, weight decay and the schedule are those of AdamW."""
    changes = {"weight_decay": 0.1, "lr_scale": LrScale(embeddings=0.5, rest=0.0)}
    ours, theirs = trainer(**changes), trainer("adamw", **changes)
    ours.train_step(), theirs.train_step()
    start, a, b = weights(trainer()), weights(ours), weights(theirs)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-6
    moved = {name for name in a if not torch.equal(a[name], start[name])}
    assert moved == {name for name in a if "norm" not in name}


@pytest.mark.slow
@needs_torchao
def test_it_follows_adamw_with_a_quarter_of_its_state(uncompiled: None, tmp_path: Path) -> None:
    ours, theirs = trainer(steps=40), trainer("adamw", steps=40)
    losses = [(a.loss, b.loss) for a, b in zip(ours, theirs, strict=True)]
    assert losses[-1][1] < 0.8 * losses[0][1]
    assert max(abs(a - b) / b for a, b in losses) < 0.02
    in_8_bits = 0
    for p, state in ours.optimizers[0].state.items():
        large = p.numel() >= 4096 and p.numel() % 256 == 0
        assert hasattr(state["exp_avg"], "codes") is hasattr(state["exp_avg_sq"], "codes") is large, p.shape
        in_8_bits += p.numel() if large else 0
    assert in_8_bits > 0.9 * sum(p.numel() for p in ours.trained)
    for t, name in ((ours, "ours"), (theirs, "theirs")):
        save_state(tmp_path / name, t, {}, {}, keep=1)
    sizes = [
        sum(
            x.nbytes for state in read_optimizers(tmp_path / name / "step-00000040")[0].values() for x in state.values()
        )
        for name in ("ours", "theirs")
    ]
    assert sizes[0] < 0.33 * sizes[1]


@pytest.mark.slow
@needs_torchao
def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Compiled, as it always is: a state that was saved and read goes through the same code."""
    whole = trainer()
    losses = [log.loss for log in whole]
    first = trainer()
    for _ in range(3):
        first.train_step()
    save_state(tmp_path, first, {"data": "a"}, {}, keep=1)
    saved = load_file(tmp_path / "step-00000003" / "optimizer.safetensors")
    assert any(name.endswith("/exp_avg.codes") and value.dtype == torch.uint8 for name, value in saved.items())
    second = trainer()
    load_state(tmp_path / "step-00000003", second, {"data": "a"})
    assert [log.loss for log in second] == losses[3:]
    a, b = weights(whole), weights(second)
    assert all(torch.equal(a[name], b[name]) for name in a)
