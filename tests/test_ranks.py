"""Several processes compute what one computes: the same losses, the same weights."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers.architectures import ARCHITECTURES, SMALL, tiny
from helpers.several import Outcome, trained
from helpers.training import examples, spec
from sftflow.checkpoint import require_own_names
from sftflow.foundation.errors import CheckpointError
from sftflow.foundation.ranks import Ranks, lost
from sftflow.foundation.rounding import round_bf16
from sftflow.training.batch_plan import dealt, micro_batches

VARIANTS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "sharded": {"shard": "full"},
    "sharded, untied": {"shard": "full", "model": "Qwen3"},
    "replicated, one row with labels": {"rows": 1, "clip": 0.0},
    "sharded, three rows with labels": {"rows": 3, "shard": "full"},
    "sharded, no row with labels": {"rows": 0, "shard": "full", "steps": 2},
    "padded": {"packing": False, "shard": "full"},
    "weighted": {"weighted": True, "shard": "full"},
    "weighted, lora, bf16": {"weighted": True, "lora": {"rank": 4}, "precision": "bf16"},
    "compiled": {"compile": True, "shard": "full", "steps": 4},
    "gradient checkpointing": {"gradient_checkpointing": True, "shard": "full"},
    "lora": {"lora": {"rank": 4}, "lr": 1e-3},
    "lora, sharded": {"lora": {"rank": 4}, "lr": 1e-3, "shard": "full"},
    "lora, sharded, untied": {"lora": {"rank": 4}, "lr": 1e-3, "shard": "full", "model": "Qwen3"},
    "lora, bf16": {"lora": {"rank": 4}, "precision": "bf16"},
    "lora, sharded, bf16": {"lora": {"rank": 4}, "precision": "bf16", "shard": "full"},
    "muon": {"optimizer": "muon", "shard": "full"},
    "muon, replicated": {"optimizer": "muon"},
    "bf16": {"precision": "bf16", "shard": "full"},
    "bf16, replicated": {"precision": "bf16"},
    "bf16, gates": {"precision": "bf16", "shard": "full", "model": "SftflowNanochat"},
}
LOOSE = {"muon": 1e-3, "muon, replicated": 1e-3, "bf16": 2e-3, "bf16, replicated": 2e-3, "bf16, gates": 2e-3}
LOOSE |= {"weighted, lora, bf16": 2e-3, "lora, bf16": 2e-3, "lora, sharded, bf16": 2e-3}
"""Muon iterates in bf16 where the processor has it; bf16 products are summed up in other micro-batches"""


KEY_BIASES = ("k_proj.bias", "c_attn.bias", "query_key_value.bias")
"""a bias of the keys adds the same to all scores of a query: its gradient is rounding alone, which AdamW scales up"""


def require_same(one: Outcome, several: Outcome, bound: float) -> None:
    assert several.losses == pytest.approx(one.losses, abs=bound)
    assert several.norms == pytest.approx(one.norms, rel=10 * bound)
    assert one.weights.keys() == several.weights.keys()
    compared = [name for name in one.weights if not name.endswith(KEY_BIASES)]
    assert max(float((one.weights[k] - several.weights[k]).abs().max()) for k in compared) <= bound


def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    sharded = {"steps": 6, "shard": "full", "rows": 3, "model": "Qwen3"}
    variants = [{"steps": 4, "weighted": True}, sharded]
    kept = sharded | {"until": 4, "state": str(tmp_path / "state"), "gathered": str(tmp_path)}
    several = trained(2, [*variants, kept], tmp_path)
    alone = trained(1, variants, tmp_path)
    for one, two in zip(alone, several, strict=False):
        require_same(one, two, 1e-5)
    file = load_file(tmp_path / "model.safetensors")
    wanted = {name: round_bf16(weight) for name, weight in several[2].weights.items()}
    assert file.keys() == wanted.keys() and all(torch.equal(file[name], wanted[name]) for name in file)
    (rest,) = trained(1, [sharded | {"state": str(tmp_path / "state")}], tmp_path)
    assert rest.losses == pytest.approx(alone[1].losses[4:], abs=1e-5)


ADAPTER = {"lora": {"rank": 4}, "lr": 1e-3}


KINDS = [{}, ADAPTER, {"optimizer": "muon"}, {"model": "GPT2"}, {"model": "GPT2", "dropout": 0.1}]


@pytest.mark.slow
def test_a_state_goes_on_bitwise_and_in_any_other_number_of_ranks(tmp_path: Path) -> None:
    def each(**more: Any) -> list[dict[str, Any]]:
        return [{**kind, "steps": 8, **more} for kind in KINDS]

    def stopped(name: str, **more: Any) -> list[dict[str, Any]]:
        return [v | {"until": 4, "state": str(tmp_path / f"{name}-{n}")} for n, v in enumerate(each(**more))]

    def going_on(name: str, as_: str, **more: Any) -> list[dict[str, Any]]:
        for n in range(len(KINDS)):
            shutil.copytree(tmp_path / f"{name}-{n}", tmp_path / f"{name}-{as_}-{n}")
        return [v | {"state": str(tmp_path / f"{name}-{as_}-{n}")} for n, v in enumerate(each(**more))]

    def same(whole: list[Outcome], rest: list[Outcome], exactly: bool = False) -> None:
        for kind, one, other in zip(KINDS, whole, rest, strict=True):
            if exactly:
                assert other.losses == one.losses[4:], kind
                assert all(torch.equal(other.weights[name], one.weights[name]) for name in one.weights), kind
            elif "dropout" not in kind:
                bound = 1e-3 if "optimizer" in kind else 1e-5
                require_same(Outcome(one.losses[4:], one.norms[4:], one.weights), other, bound)

    n = len(KINDS)
    alone = trained(1, each(), tmp_path)
    trained(1, stopped("one"), tmp_path)
    sharded, replicated = {"shard": "full"}, {"shard": "no"}
    two = each(**sharded) + each(**replicated) + stopped("full", **sharded) + stopped("no", **replicated)
    whole = trained(2, two, tmp_path)
    more = going_on("full", "two", **sharded) + going_on("no", "two", **replicated) + going_on("one", "two", **sharded)
    rest = trained(2, more, tmp_path)
    same(whole[:n], rest[:n], exactly=True)
    same(whole[n : 2 * n], rest[n : 2 * n], exactly=True)
    same(alone, rest[2 * n :])
    same(alone, trained(1, going_on("full", "one"), tmp_path))
    same(alone, trained(1, going_on("no", "one"), tmp_path))
    same(alone, trained(4, going_on("full", "four", **sharded), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_as_one_process_does_in_every_way(world: int, tmp_path: Path) -> None:
    variants = list(VARIANTS.values())
    two = dict(zip(VARIANTS, trained(world, variants, tmp_path), strict=True))
    for name, one in zip(VARIANTS, trained(1, variants, tmp_path), strict=True):
        assert len(one.losses) > 1, name
        require_same(one, two[name], LOOSE.get(name, 1e-5))
    require_same(two["bf16"], two["bf16, replicated"], 1e-6)  # rows are rounded as they are in the whole
    require_same(two["lora, sharded, bf16"], two["lora, bf16"], 1e-6)


@pytest.mark.slow
def test_every_architecture_trains_as_one_process_does(tmp_path: Path) -> None:
    variants = [{"model": name, "shard": shard, "steps": 5} for name in ARCHITECTURES for shard in ("no", "full")]
    for variant, one, several in zip(
        variants, trained(1, variants, tmp_path), trained(2, variants, tmp_path), strict=True
    ):
        try:
            require_same(one, several, 1e-5)
        except AssertionError as error:
            raise AssertionError(str(variant)) from error


@given(st.integers(1, 40), st.integers(1, 9), st.integers(64, 600), st.booleans(), st.integers(0, 5))
def test_every_row_is_computed_exactly_once(n: int, world: int, micro: int, packing: bool, seed: int) -> None:
    rows = examples(n, seed)
    settings = spec(micro_tokens=micro, packing=packing)
    alone = micro_batches(rows, settings)
    ranks = [micro_batches(rows, settings, Ranks(rank, world)) for rank in range(world)]
    even = [micro_batches(rows, settings, Ranks(rank, world), even=True) for rank in range(world)]
    assert len({len(batches) for batches in even}) == 1
    for several in (ranks, even):
        labels = Counter(label for batches in several for b in batches for label in b.labels.tolist())
        assert labels == Counter(label for b in alone for label in b.labels.tolist())
    assert max((b.n_computed for batches in ranks for b in batches), default=0) <= micro


@given(st.lists(st.integers(1, 1000)), st.integers(1, 9))
def test_parts_are_dealt_evenly(costs: list[int], world: int) -> None:
    hands = dealt(costs, world)
    assert sorted(part for hand in hands for part in hand) == list(range(len(costs)))
    loads = [sum(costs[part] for part in hand) for hand in hands]
    assert max(loads) - min(loads) <= max([0, *costs])  # nobody gains by handing over a whole part


def test_a_world_of_one() -> None:
    alone = Ranks()
    assert alone.first and alone.gather(3) == [3] and alone.from_first(3) == 3
    assert alone.total(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_a_model_that_is_saved_under_other_names_is_refused_before_it_is_sharded() -> None:
    import transformers

    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(CheckpointError, match=r"train\.shard: the weights of MixtralForCausalLM "):
        require_own_names(transformers.MixtralForCausalLM(config))
    require_own_names(tiny("Llama"))


def test_what_says_that_another_rank_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftflow.foundation.ranks._present", Ranks(1, 2))
    gone = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9133"
    assert lost(RuntimeError(gone)) and lost(torch.distributed.DistNetworkError("no answer"))
    assert not lost(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))
    assert not lost(RuntimeError("NCCL: out of memory")) and not lost(ValueError(gone))
