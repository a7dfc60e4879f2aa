"""Packed == unpacked, chunked == full loss, save and load: on tiny random models of real transformers code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.architectures import ARCHITECTURES, FP32, REFUSED, SMALL, STATEFUL, VOCABULARY, stateful, tiny
from sftflow.foundation.errors import CheckpointError
from sftflow.generation.check_decoder import find_decode_mode
from sftflow.packing.attending import attending, own_logits
from sftflow.packing.attention import NAME
from sftflow.packing.check_model import check_length, prove_forward, sees_neighbours
from sftflow.packing.fused import fused
from sftflow.packing.loss import batch_loss
from sftflow.packing.pack import Example, pack_batch, pad_batch
from sftflow.recipe import Train
from sftflow.training.optimizers import groups_of, muon
from sftflow.training.settings import set_dropout


def rows(count: int = 9, seed: int = 0) -> list[Example]:
    """Conversations of 2 to 30 tokens; most begin alike, one is there twice, one is the beginning of another, one
    has nothing supervised."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, VOCABULARY, 8)
    out = []
    for number in range(count):
        ids = rng.integers(0, VOCABULARY, int(rng.integers(2, 22)))
        if number % 3:
            ids = np.concatenate([first[: 4 + number % 5], ids])
        out.append(Example(ids=ids, mask=rng.integers(0, 2, len(ids)).astype(np.int8), source=number % 2))
    out.append(out[1])
    long = out[2]
    out.append(Example(ids=long.ids[: len(long.ids) // 2], mask=np.ones(len(long.ids) // 2, np.int8)))
    out.append(Example(ids=first, mask=np.zeros(8, np.int8)))
    return out


def full_logits(model: Any, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """The oracle: every sequence alone through the model's own forward, all logits, torch's cross-entropy."""
    total: Any = 0.0
    for e in examples:
        logits = model(input_ids=torch.from_numpy(e.ids)[None], use_cache=False).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(e.ids[1:]), reduction="none")
        total = total + (losses * torch.from_numpy(e.mask[1:])).sum()
    total.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(total.detach()), grads


def close(model: Any, examples: list[Example], compute: Callable[[], torch.Tensor], wanted: Any) -> None:
    loss, grads = wanted
    n = sum(int(e.mask[1:].sum()) for e in examples)
    losses = compute()
    assert not losses.requires_grad and len(losses) == n
    assert float(losses.sum()) / n == pytest.approx(loss / n, abs=1e-5)
    for key, parameter in model.named_parameters():
        if key in grads:
            scale = max(1.0, float(grads[key].abs().max()))
            assert float((parameter.grad - grads[key]).abs().max()) <= 1e-5 * n * scale, key
    model.zero_grad()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_unpacked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient, by each of the ways that run here."""
    model, examples = tiny(name), rows()
    wanted = full_logits(model, examples)
    model.train()
    supervised = [e for e in examples if e.mask[1:].any()]
    for share in (True, False):
        batch = pack_batch(supervised, share=share, multiple=16)
        assert batch.n_supervised == sum(int(e.mask[1:].sum()) for e in examples)
        close(model, examples, lambda batch=batch: batch_loss(model, batch, FP32, scale=1.0), wanted)  # type: ignore[misc]
        monkeypatch.setattr("sftflow.packing.attention.SMALL", 0)  # torch's own attention
        close(model, examples, lambda batch=batch: batch_loss(model, batch, FP32, scale=1.0), wanted)  # type: ignore[misc]
        monkeypatch.undo()
    model.set_attn_implementation("eager")
    padded = pad_batch(supervised)
    close(model, examples, lambda: batch_loss(model, padded, FP32, packed=False, scale=1.0), wanted)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_norms_and_rotary_in_few_passes_are_theirs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and every gradient, beside autograd through transformers' own in fp64; several pieces of rows."""
    monkeypatch.setattr("sftflow.packing.fused.CHUNK", 100)
    model = tiny(name)
    torch.manual_seed(0)
    by_name = {attribute: (target, ours) for target, attribute, ours in fused(model)}
    norm, ours = by_name["forward"]
    file, rotary = by_name["apply_rotary_pos_emb"]

    def values(of: Any, inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        out = of(*inputs)
        outs = list(out) if isinstance(out, tuple) else [out]
        steps = [torch.cos(torch.arange(x.numel())).view(x.shape).to(x.dtype) for x in outs]
        return outs + list(torch.autograd.grad(outs, inputs + weights, steps))

    norm.weight.data.normal_()
    x = torch.randn(1, 31, len(norm.weight))
    mine = values(ours, [x], [norm.weight])
    theirs = values(type(norm).forward.__get__(norm.double()), [x.double()], [norm.weight])
    q, k = torch.randn(1, 31, 4, 8).transpose(1, 2), torch.randn(1, 31, 2, 8).transpose(1, 2)
    cos, sin = torch.randn(2, 1, 31, 8)
    mine += values(lambda q, k: rotary(q, k, cos, sin), [q, k], [])
    theirs += values(lambda q, k: file.apply_rotary_pos_emb(q, k, cos, sin), [q.double(), k.double()], [])
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32 and float((a - b).detach().abs().max()) <= 1e-6 * float(b.detach().abs().max())


def test_only_the_same_code_is_computed_in_few_passes() -> None:
    assert len(fused(tiny("Llama"))) == 6  # two norms a layer, the last, and the rotation
    assert not fused(tiny("NanoChat"))  # its norm has no weight, and it turns the other way round
    model = tiny("Llama")
    model.model.norm.forward = lambda x: x  # somebody else's
    model.model.layers[0].compile()
    assert not fused(model)
    model.model.layers[0]._compiled_call_impl = None
    assert len(fused(model)) == 5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_proof_passes_and_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prove_forward(model)
    assert model.config._attn_implementation == "eager" and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trained_model_saves_and_loads(name: str, tmp_path: Path) -> None:
    """Trained packed for a step, saved as transformers saves, loaded: the model's own forward gives our loss."""
    from transformers import AutoModelForCausalLM

    model, examples = tiny(name), rows()
    batch = pack_batch([e for e in examples if e.mask[1:].any()])
    batch_loss(model, batch, FP32, scale=1.0)
    torch.optim.SGD(model.parameters(), 1e-3).step()
    ours = float(batch_loss(model.eval(), batch, FP32).sum())
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    theirs, _ = full_logits(loaded, examples)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_state_is_refused_by_name_and_trains_unpacked(name: str) -> None:
    model, examples = tiny(name), rows()
    with pytest.raises(CheckpointError, match=rf"{name}ForCausalLM cannot be trained packed.*train.packing: false"):
        prove_forward(model)
    wanted = full_logits(model, examples)
    padded = pad_batch([e for e in examples if e.mask[1:].any()])
    close(model, examples, lambda: batch_loss(model, padded, FP32, packed=False, scale=1.0), wanted)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("name", [name for name in STATEFUL if name != "Phimoe"])
def test_state_is_noticed_however_weak_it_is(name: str, size: float) -> None:
    """As a fresh model's is, whose state changes its logits by less than a proof's tolerance, until it is trained."""
    model = stateful(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size)
    assert sees_neighbours(model)
    with pytest.raises(CheckpointError, match=rf"{name}ForCausalLM cannot be trained packed"):
        prove_forward(model)
    assert find_decode_mode(model, FP32) != "packed"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_of_any_size_is_let_through(name: str) -> None:
    for size in (1e-3, 30.0):
        model = tiny(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(size)
        prove_forward(model)


def test_a_state_behind_zeros_is_noticed() -> None:
    """A projection that begins at zero lets nothing through, and will in training."""
    model = stateful("Lfm2")
    with torch.no_grad():
        model.model.layers[0].conv.out_proj.weight.zero_()
    with pytest.raises(CheckpointError, match="it carries state from one conversation into the next"):
        prove_forward(model)
    assert not model.model.layers[0].conv.out_proj.weight.any()


def test_a_head_that_is_not_a_plain_projection_is_refused() -> None:
    model = tiny("Llama")
    own = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    model.forward = shifted
    with pytest.raises(CheckpointError, match="its logits are not those that training would compute"):
        prove_forward(model)


def test_a_head_of_another_shape_is_refused_unpacked_too() -> None:
    """FalconH1 multiplies its logits by a number of its own: our head would train another loss."""
    from transformers import AutoModelForCausalLM, FalconH1Config

    torch.manual_seed(0)
    config = FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, lm_head_multiplier=0.3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for packed in (True, False):
        with pytest.raises(CheckpointError, match="FalconH1ForCausalLM cannot be trained"):
            prove_forward(model, packed)


def test_a_window_that_only_the_mask_has_is_refused() -> None:
    """Phimoe's attention is not told of its window, here one longer than the proof's sequences."""
    from transformers import AutoModelForCausalLM, PhimoeConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PhimoeConfig(**SMALL, num_local_experts=4, sliding_window=64))
    with pytest.raises(CheckpointError, match="PhimoeForCausalLM cannot be trained packed"):
        prove_forward(model)
    assert model.config.sliding_window == 64


def test_lengths_at_which_a_model_changes_are_refused() -> None:
    from transformers import AutoModelForCausalLM, Phi3Config

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    config = Phi3Config(
        **SMALL,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        rope_parameters=rope | {"original_max_position_embeddings": 32},
    )
    model = AutoModelForCausalLM.from_config(config)
    check_length(model, 32)
    with pytest.raises(CheckpointError, match=r"train.max_length: Phi3ForCausalLM.*longrope.*beyond 32 tokens; lower"):
        check_length(model, 33)
    for name in ARCHITECTURES:
        check_length(tiny(name), 4096)


def test_every_dropout_is_set() -> None:
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    config.word_embed_proj_dim = 32
    model = AutoModelForCausalLM.from_config(config)
    assert model.model.decoder.layers[0].dropout == 0.1
    set_dropout(model, 0.0)
    assert model.model.decoder.layers[0].dropout == model.model.decoder.dropout == model.config.dropout == 0
    ids = torch.arange(20)[None]
    assert torch.equal(model.train()(ids).logits, model(ids).logits)


def test_parameters_are_grouped_by_what_they_are() -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    experts = AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))
    groups = groups_of(experts)
    assert any(p.ndim == 3 for p in groups["matrices"]) and all(p.ndim < 2 for p in groups["rest"])
    assert all(
        p.ndim == 2
        for o in muon(groups, Train(lr=1e-3, weight_decay=0.1))[:1]
        for g in o.param_groups
        for p in g["params"]
    )
    gpt2 = tiny("GPT2")
    tables = (gpt2.transformer.wte.weight, gpt2.transformer.wpe.weight)
    assert {id(p) for p in groups_of(gpt2)["embeddings"]} == {id(p) for p in tables}
    for model in (experts, gpt2):
        groups = groups_of(model)
        assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_every_mode_is_left_as_it_was_entered(name: str) -> None:
    """Nested, with other forwards and a sparse gradient, and when an error ends it."""
    model = tiny(name)
    embedding, layer = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight.grad = torch.zeros_like(embedding.weight)

    def state() -> Any:
        return model.config._attn_implementation, embedding.sparse, layer.__dict__.get("forward")

    found, double = state(), lambda x: 2 * F.linear(x, layer.weight)
    with attending(model, "packed", sparse_embedding=True):
        packed = state()
        assert packed == (NAME, True, None)
        with attending(model, "packed", forwards=[(layer, double)]):
            assert state() == (NAME, True, double)
            with pytest.raises(ValueError, match="layout"):  # packed rows only
                own_logits(model, [1, 2, 3])
            with attending(model, "own"):
                assert state() == ("sdpa", True, double)
                twice = own_logits(model, [1, 2, 3])
            assert state() == (NAME, True, double)
        assert state() == packed
    assert state() == found
    with pytest.raises(KeyError), attending(model, "packed", forwards=[(layer, double)]):
        raise KeyError
    assert state() == found
    torch.testing.assert_close(twice, 2 * own_logits(model, [1, 2, 3]))
    embedding.weight.grad = None
    with attending(model, "own", sparse_embedding=True):  # a gradient of its own would be a sparse tensor
        assert state() == found
