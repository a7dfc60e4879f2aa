"""The loop is exact: packed == unpacked, accumulation changes nothing, a killed run resumes bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.architectures import tiny
from helpers.runs import Quiet, write_recipe
from helpers.training import BF16, FP32, examples, shared_rows, spec
from sftflow.foundation.errors import RunError
from sftflow.foundation.rounding import round_bf16
from sftflow.foundation.runtime import Runtime
from sftflow.packing.loss import Head, chunked_cross_entropy, fused_parts, loss_parts
from sftflow.packing.pack import best_fit
from sftflow.pretraining.pretrain import BaseSpec, build_model
from sftflow.recipe import Schedule
from sftflow.training.batch_plan import RowPlan
from sftflow.training.bf16_weights import restore_classes
from sftflow.training.optimizers import lr_factor
from sftflow.training.trainer import Trainer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("parts", [loss_parts, fused_parts])
def test_chunked_loss_equals_full(
    bias: bool, softcap: float | None, scale: float, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftflow.packing.loss.LOGITS", 50 * 256)
    monkeypatch.setattr("sftflow.packing.loss.BLOCK", 50 * 100)
    torch.manual_seed(0)
    n = 700  # more than two chunks
    hidden = torch.randn(n, 16, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    b = torch.randn(50, requires_grad=True) if bias else None
    targets = torch.randint(0, 50, (n,))
    head = Head(weight=weight, bias=b, softcap=softcap, scale=scale)
    per_token = chunked_cross_entropy(hidden, head, targets, scale=0.5, parts=parts)
    leaves = [x for x in (hidden, weight, b) if x is not None]
    ours = [x.grad for x in leaves]
    logits = torch.nn.functional.linear(hidden, weight, b) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(per_token, expected, atol=1e-5)
    for a, e in zip(ours, torch.autograd.grad(expected.sum() * 0.5, leaves), strict=True):
        assert torch.allclose(a, e, rtol=1e-4, atol=1e-3)


def run_loop(micro: int, optimizer: str, steps: int = 4) -> dict[str, torch.Tensor]:
    model = build_model(BaseSpec(params="0.1M", context=64), 320, 0)
    s = spec(micro_tokens=micro, optimizer=optimizer, steps=steps)
    for _ in Trainer(model, RowPlan(examples(60), s), s, FP32):
        pass
    return {k: p.detach().clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize(("optimizer", "bound"), [("adamw", 1e-5), ("muon", 1e-3)])
def test_accumulation_changes_nothing(optimizer: str, bound: float) -> None:
    whole, eighths = run_loop(512, optimizer), run_loop(64, optimizer)
    assert max(float((whole[k] - eighths[k]).abs().max()) for k in whole) <= bound


def test_an_epoch_is_packed_once_and_steps_do_not_hang_on_what_was_asked_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: list[int] = []
    monkeypatch.setattr("sftflow.training.batch_plan.best_fit", lambda *a: packed.append(1) or best_fit(*a))
    s = spec(steps=None, epochs=4)
    rows = examples(100)
    plan = RowPlan(rows, s)
    steps = [[[id(e) for e in row] for row in plan.step_rows(i)] for i in range(plan.total_steps)]
    assert len(packed) == 4
    fresh = RowPlan(rows, s)
    assert [[id(e) for e in row] for row in fresh.step_rows(plan.total_steps - 2)] == steps[-2]
    assert [[id(e) for e in row] for row in fresh.step_rows(1)] == steps[1]


@pytest.mark.parametrize(("optimizer", "bound"), [("adamw", 1e-5), ("muon", 1e-3)])
@pytest.mark.parametrize("tied", [True, False])
def test_packing_and_sharing_change_nothing(optimizer: str, bound: float, tied: bool) -> None:
    """Four steps packed with shared beginnings, packed without, compiled, checkpointed, and one conversation a row
    through the model's own forward pass: the same weights, of fewer computed tokens where beginnings are shared."""
    from transformers import LlamaForCausalLM

    def run(**changes: Any) -> tuple[dict[str, torch.Tensor], int]:
        model = build_model(BaseSpec(params="0.1M", context=64), 320, 0)
        model.config.tie_word_embeddings = tied
        model = LlamaForCausalLM(model.config)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.1)
        s = spec(optimizer=optimizer, steps=4, tokens_per_step=1024, **changes)
        logs = list(Trainer(model, RowPlan(shared_rows(), s), s, FP32))
        return {k: p.detach().clone() for k, p in model.named_parameters()}, sum(x.computed_tokens for x in logs)

    unpacked, all_tokens = run(packing=False)
    ways: list[dict[str, Any]] = [{}, {"share_prefixes": False}, {"gradient_checkpointing": True}]
    if tied and optimizer == "adamw":
        ways.append({"compile": True})
    for way in ways:
        weights, computed = run(**way)
        assert max(float((weights[k] - unpacked[k]).abs().max()) for k in weights) <= bound, way
        assert computed < all_tokens if way.get("share_prefixes", True) else computed == all_tokens


def test_every_row_is_used_once_an_epoch() -> None:
    rows = examples(100)
    plan = RowPlan(rows, spec(steps=None, epochs=1))
    seen = [id(e) for s in range(plan.total_steps) for row in plan.step_rows(s) for e in row]
    assert sorted(seen) == sorted(id(e) for e in rows)


def test_bf16_rounding_keeps_bf16_numbers_and_loses_no_update() -> None:
    torch.manual_seed(0)
    grid = torch.randn(300, 200).bfloat16().float()
    assert torch.equal(round_bf16(grid).float(), grid)
    gap = 2.0 ** (torch.floor(torch.log2(grid.abs())) - 7)  # to the next bf16 number
    moved = grid + 0.1 * gap * grid.sign()
    assert torch.equal(moved.bfloat16().float(), grid)  # to nearest, nothing has moved
    share = ((round_bf16(moved).float() - grid) / (gap * grid.sign())).mean()
    assert float(share) == pytest.approx(0.1, abs=0.005)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38])
    assert torch.equal(round_bf16(odd)[1:5], odd[1:5].bfloat16()) and round_bf16(odd)[0].isnan()


@settings(max_examples=50)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_rounding_goes_to_a_neighbour(value: float) -> None:
    w = torch.full((7, 5), value)
    rounded = round_bf16(w).float()
    down = (w.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((w.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert bool(((rounded == down) | (rounded == up)).all())


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_bf16_follows_fp32_where_plain_autocast_does_not(name: str) -> None:
    """From a base on bf16 numbers, with steps far below their distance: the losses of 12 steps."""

    def losses(runtime: Runtime, copies: bool = True) -> np.ndarray[Any, Any]:
        model = tiny(name)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16().float())
        s = spec(steps=12, lr=1e-4, schedule=Schedule(kind="constant", warmup=0.0))
        trainer = Trainer(model, RowPlan(shared_rows()[:24], s), s, runtime)
        if not copies:
            restore_classes(model)
            trainer.bf16 = None
        return np.array([trainer.train_step().loss for _ in range(12)])

    exact = losses(FP32)
    ours, plain = losses(BF16), losses(BF16, copies=False)
    assert exact[0] - exact[-1] > 0.02
    assert abs(ours / exact - 1).max() < 0.004
    assert abs(plain / exact - 1).max() > 2 * abs(ours / exact - 1).max()


@pytest.mark.slow
def test_a_compiled_layer_keeps_no_product_of_gate_and_activation() -> None:
    """Elementwise results are computed again for the backward pass: of its feed-forward's width a layer keeps two
    tensors, what its gate and its other projection give, and not their product. Loss and gradient are the plain
    model's."""

    def first_step(compiled: bool) -> tuple[list[float], int]:
        model = build_model(BaseSpec(params="0.1M", context=64), 320, 0)
        asked = spec(tokens_per_step=256, compile=compiled)
        trainer = Trainer(model, RowPlan(shared_rows(), asked), asked, FP32)
        kept: dict[int, torch.Tensor] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            if not isinstance(x, torch.nn.Parameter):
                kept[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            log = trainer.train_step()
        wide = sum(x.shape[-1] == model.config.intermediate_size for x in kept.values() if x.ndim)
        return [log.loss, log.grad_norm], wide

    (plain, _), (compiled, n) = first_step(False), first_step(True)
    assert compiled == pytest.approx(plain, abs=1e-5)
    assert n == 2 * 2


def test_schedule() -> None:
    schedule = Schedule(kind="linear", warmup=0.2, warmdown=0.5, final=0.0)
    linear = [round(lr_factor(s, 10, schedule), 2) for s in range(10)]
    assert linear == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]


def test_a_step_that_is_not_finite_is_skipped_and_three_stop_the_run() -> None:
    model = build_model(BaseSpec(params="0.1M", context=64), 320, 0)
    s = spec(steps=5)
    trainer = Trainer(model, RowPlan(examples(60), s), s, FP32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = copy.deepcopy(model.model.embed_tokens.weight)
    assert trainer.train_step().skipped
    assert torch.equal(model.model.embed_tokens.weight, before)
    trainer.require_finite(trainer.train_step())
    with pytest.raises(RunError, match="not finite"):
        trainer.require_finite(trainer.train_step())


def test_the_checkpoint_is_a_hugging_face_one(tiny_base: Path, tmp_path: Path) -> None:
    """It loads with transformers alone, renders the same, stops at the same token, and new rows are the old mean."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sftflow.checkpoint import load_assistant, prepare, resolve
    from sftflow.recipe import load_recipe
    from sftflow.training.run import run_training

    run_training(load_recipe(write_recipe(tmp_path, tiny_base, steps=2)), Quiet())
    directory = tmp_path / "run" / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assistant = load_assistant(str(tmp_path / "run"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, assistant.model.state_dict()[key]), key
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    from sftflow.chat.schema import parse_row

    assert (
        assistant.renderer.render(
            parse_row([{"role": "user", "content": "hi"}], ""), add_generation_prompt=True
        ).ids.tolist()
        == ids
    )
    assert tokenizer.convert_tokens_to_ids("<|assistant_end|>") in np.atleast_1d(model.generation_config.eos_token_id)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    grown, _, _, _ = prepare(resolve(str(tiny_base)))
    old = base.get_input_embeddings().weight
    new = grown.get_input_embeddings().weight
    assert new.shape[0] == old.shape[0] + 8
    assert torch.allclose(new[old.shape[0] :], old.mean(0).expand(8, -1), atol=1e-6)
    assert grown.lm_head.weight.data_ptr() == new.data_ptr()  # tied as before


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_on_a_padding_row_starts_like_any_other(tied: bool, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Of an embedding with more rows than the tokenizer has tokens, to a round number."""
    import transformers

    from sftflow.checkpoint import prepare, resolve

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.save_pretrained(tmp_path)
    n = len(tokenizer)
    config = transformers.PhiConfig(
        vocab_size=n + 4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias.normal_()
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[n:] = 9.0  # what nobody has trained
    model.save_pretrained(tmp_path)
    grown, tokenizer, _, _ = prepare(resolve(str(tmp_path)))
    assert len(tokenizer) > n + 4 and grown.get_input_embeddings().weight.shape[0] == len(tokenizer)
    for was, now in (
        (model.model.embed_tokens.weight, grown.model.embed_tokens.weight),
        (model.lm_head.weight, grown.lm_head.weight),
        (model.lm_head.bias, grown.lm_head.bias),
    ):
        assert torch.equal(now[:n], was[:n])
        assert torch.allclose(now[n:], was[:n].mean(0).expand_as(now[n:]), atol=1e-6)
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == tied
