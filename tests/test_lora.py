"""LoRA is trained as peft's own model would be, in a plain loop over unpacked rows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from helpers.architectures import ARCHITECTURES, SMALL, tiny
from helpers.runs import error_line, run, write_recipe
from helpers.training import BF16, FP32, shared_rows, spec
from sftflow.checkpoint.location import Location
from sftflow.foundation.errors import RecipeError
from sftflow.recipe import Lora, Train
from sftflow.training.batch_plan import RowPlan
from sftflow.training.lora import attach, base_reference, not_plain, target_names, without_adapter
from sftflow.training.optimizers import lr_factor
from sftflow.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`", "ignore:The PEFT config")

ROWS = [3, 7, 250, 319]
STEPS = 5


def settings_of(**lora: Any) -> Train:
    return spec(lr=1e-3, steps=STEPS, micro_tokens=192, weight_decay=0.1, lora=Lora(**{"rank": 4, **lora}))


def noisy(wrapped: Any) -> Any:
    """B starts at zero, and an adapter that adds nothing proves nothing."""
    source = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=source) * 0.05
    return wrapped


def peft_alone(model: Any, config: Any, settings: Train) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses, adapter) of peft's model: each conversation by itself, full logits, torch's cross-entropy."""
    torch.manual_seed(settings.seed)
    wrapped = noisy(peft.get_peft_model(model, config))
    plan = RowPlan(shared_rows(), settings)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    ends = ("token_adapter", "modules_to_save", "embed")
    decays = [p for n, p in trained.items() if p.ndim > 1 and not any(e in n for e in ends)]
    others = [p for p in trained.values() if not any(p is d for d in decays)]
    groups = [{"params": decays, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.peak_lr, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(plan.total_steps):
        rows = [e for row in plan.step_rows(step) for e in row]
        count = sum(int(e.mask[1:].sum()) for e in rows)
        total = 0.0
        for example in rows:
            ids = torch.tensor(example.ids[None])
            logits = wrapped(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            part = (loss * torch.tensor(example.mask[1:])).sum() / count
            part.backward()
            total += float(part.detach())
        torch.nn.utils.clip_grad_norm_(list(trained.values()), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_lr * lr_factor(step, plan.total_steps, settings.schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)


def ours(model: Any, settings: Train, rows: list[int], runtime: Any = FP32) -> tuple[Any, list[float]]:
    assert settings.lora is not None
    wrapped = noisy(attach(model, settings.lora, "base", rows, settings.seed))
    assert wrapped.base_model.model is model
    trainer = Trainer(model, RowPlan(shared_rows(), settings), settings, runtime)
    return wrapped, [log.loss for log in trainer]


def require_same(name: str, settings: Train, rows: list[int]) -> Any:
    model = tiny(name)
    base = copy.deepcopy(model)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    wrapped, losses = ours(model, settings, rows)
    config = copy.deepcopy(wrapped.peft_config["default"])
    wanted, adapter = peft_alone(base, config, settings)
    assert losses == pytest.approx(wanted, abs=1e-5)
    mine = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert mine.keys() == adapter.keys()
    for key, value in mine.items():
        assert float((value - adapter[key]).abs().max()) <= 1e-4, key
    still = dict(model.named_parameters(remove_duplicate=False))
    for key, value in frozen.items():  # nothing of the base has moved but the rows that are trained
        now = next(p for n, p in still.items() if n in (key, *_inside(key)))
        same = torch.ones(len(value), dtype=torch.bool)
        same[rows if value.shape[0] == 320 and value.ndim == 2 else []] = False
        assert torch.equal(now[same], value[same]), key
    return wrapped


def _inside(key: str) -> list[str]:
    """Where peft keeps a weight that it has wrapped."""
    stem, _, last = key.rpartition(".")
    parts = ("base_layer", "token_adapter.base_layer", "original_module")
    return [f"{stem}.{part}.{last}" for part in parts]


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT2"])
def test_new_rows_and_every_layer(name: str) -> None:
    wrapped = require_same(name, settings_of(), ROWS)
    assert not_plain(wrapped) == ["4 new token rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("Llama", "Qwen3", "GPT2")])
def test_every_architecture(name: str) -> None:
    require_same(name, settings_of(targets="attention"), [])
    require_same(name, settings_of(), ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize("lora", [{"rslora": True}, {"dora": True}, {"train_embeddings": True}, {"alpha": 7.5}])
def test_every_option(name: str, lora: dict[str, Any]) -> None:
    require_same(name, settings_of(**lora), [] if "train_embeddings" in lora else ROWS)


def test_a_scale_that_llama_cpp_does_not_read_is_told_of() -> None:
    said = [not_plain(attach(tiny("Llama"), Lora(rslora=rslora), "base", [], 0)) for rslora in (True, False)]
    assert said == [["rslora's scale (llama.cpp would take alpha / rank)"], []]


def test_experts_held_as_one_tensor_are_told_of() -> None:
    import transformers

    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(config).float()
    experts = 2 * 4 * 3 * SMALL["hidden_size"] * SMALL["intermediate_size"]
    assert without_adapter(model, Lora()) == experts and without_adapter(model, Lora(targets="attention")) == 0
    assert without_adapter(tiny("Llama"), Lora()) == 0
    assert target_names(model, "all") == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.slow
def test_at_the_size_of_a_real_checkpoint() -> None:
    """SmolLM2-135M's config with random weights: 30 layers, tied, 49,152 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(**shape, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().eval()
    settings = settings_of(rank=16, alpha=32).model_copy(update={"tokens_per_step": 128, "micro_tokens": 128})
    base = copy.deepcopy(model)
    wrapped, losses = ours(model, settings, [49150, 49151])
    wanted, _ = peft_alone(base, copy.deepcopy(wrapped.peft_config["default"]), settings)
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert losses[-1] != losses[0]


def test_no_shared_beginnings_and_accumulation_change_nothing() -> None:
    settings = settings_of()
    _, whole = ours(tiny("Llama"), settings, ROWS)
    for change in ({"share_prefixes": False}, {"micro_tokens": 64}, {"gradient_checkpointing": True}):
        _, other = ours(tiny("Llama"), settings.model_copy(update=change), ROWS)
        assert other == pytest.approx(whole, abs=1e-5), change


def test_bf16_keeps_the_frozen_base_in_bf16_and_computes_what_its_copies_would() -> None:
    model = tiny("Qwen3")
    _, losses = ours(model, settings_of(), ROWS, BF16)
    layer: Any = model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16 and layer.lora_A["default"].weight.dtype == torch.float32
    _, exact = ours(tiny("Qwen3"), settings_of(), ROWS)
    assert losses != exact and losses == pytest.approx(exact, abs=0.02)


LORA = {"optimizer": "adamw", "lr": "auto", "lora": {"rank": 4}, "keep": 9}


def test_a_run_of_the_command_line(tiny_base: Path, tmp_path: Path) -> None:
    """It tells what is trained, resumes bitwise, and peft loads what it saves."""
    recipe, out = write_recipe(tmp_path, tiny_base, **LORA), tmp_path / "run"
    done = run("train", str(recipe))
    assert done.returncode == 0 and "AdamW (auto: an adapter)" in done.stderr, done.stderr
    checkpoint = out / "checkpoint"
    whole = (checkpoint / "adapter_model.safetensors").read_bytes()
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert (out / "resume/step-00000012/model.safetensors").stat().st_size < 1.2 * len(whole)
    for step in (16, 20):
        for file in (state := out / f"resume/step-{step:08d}").iterdir():
            file.unlink()
        state.rmdir()
    (out / "DONE").unlink()
    again = run("train", str(recipe), "--resume")
    assert "resumed at step 12 of 24" in again.stderr, again.stderr
    assert (checkpoint / "adapter_model.safetensors").read_bytes() == whole
    assert [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()] == losses

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sftflow as sf

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    n = len(AutoTokenizer.from_pretrained(checkpoint))
    before = base.get_input_embeddings().weight.detach().clone()
    base.resize_token_embeddings(n, mean_resizing=False)
    loaded = peft.PeftModel.from_pretrained(base, checkpoint).eval()
    ids = torch.tensor([[5, 9, n - 1, 33, n - 2, 7]])
    mine = sf.load(out).model
    assert torch.allclose(loaded(input_ids=ids).logits, mine(input_ids=ids).logits, atol=1e-4)
    rows = mine.get_input_embeddings().weight.detach()
    assert torch.equal(rows[: len(before)], before)
    assert float((rows[len(before) :] - before.mean(0)).abs().max()) > 1e-3  # they began there, and have learnt


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lora": {"targets": ["q_prj"]}}, "no linear layer of the blocks is called 'q_prj'"),
        ({"lora": {"train_embeddings": False}}, "the chat format adds 8 tokens"),
        ({"lora": {"rank": 0}}, "train.lora.rank"),
        ({"optimizer": "muon", "lora": {}}, "muon orthogonalises whole weight matrices"),
        ({"warm_start": True, "lora": {}}, "warm_start takes over moments of all weights"),
    ],
)
def test_refused_by_name(tiny_base: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    recipe = write_recipe(tmp_path, tiny_base, **{**LORA, **change})
    assert told in error_line(run("train", str(recipe)))
    assert not (tmp_path / "run/checkpoint").exists()


def test_the_base_is_named_so_that_it_is_found_again(tmp_path: Path) -> None:
    """A .gguf file and not its folder; a hub id with its revision apart, as peft reads it; an adapter is told of."""
    hub = Location("me/base@v1", "/cache", from_hub=True)
    named = {"builtin": Location("builtin:tiny", "/tiny"), "file": Location("m.gguf", "/models", gguf="m.gguf")}
    assert base_reference(hub) == ("me/base", "v1")
    assert base_reference(named["builtin"]) == ("builtin:tiny", None)
    assert base_reference(named["file"]) == ("/models/m.gguf", None)
    (tmp_path / "adapter_config.json").write_text("{}")
    wrapped = attach(tiny("Llama"), Lora(), str(tmp_path), [], 0, "v1")
    assert wrapped.peft_config["default"].revision == "v1"
    assert not_plain(wrapped) == ["a base that is an adapter itself"]


@pytest.mark.slow
def test_an_adapter_of_a_gguf_file_and_of_an_adapter(tmp_path: Path) -> None:
    """Both are loaded again by what they name."""
    import sftflow as sf

    file = tmp_path / "base.gguf"
    assert run("export", "builtin:tiny", "--to", "gguf", "--out", str(file)).returncode == 0
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, base in ((first, file), (second, first / "run")):
        folder.mkdir()
        done = run("train", str(write_recipe(folder, base, **LORA | {"steps": 2})))
        assert done.returncode == 0, done.stderr
        sf.load(folder / "run")
    assert f"the base is {file.resolve()} with the adapter merged into it: a new adapter is trained" in done.stderr
    assert "take no adapter with a base that is an adapter itself" in done.stderr


def test_bf16_halves_what_is_frozen_in_gpt2_too() -> None:
    model = tiny("GPT2")
    _, losses = ours(model, settings_of(), ROWS, BF16)
    layer: Any = model.transformer.h[0].attn.c_attn
    assert layer.base_layer.weight.dtype == torch.bfloat16
    _, exact = ours(tiny("GPT2"), settings_of(), ROWS)
    assert losses == pytest.approx(exact, abs=0.02)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'sftflow\[lora\]'"):
        attach(tiny("Llama"), Lora(), "base", [], 0)
