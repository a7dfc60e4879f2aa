"""Adapters of peft: each kind merged computes what peft computes, and what cannot be is refused before writing."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import runs
from helpers.adapters import (
    IDS,
    QV,
    greedy,
    logits,
    lora,
    off_by,
    randomise,
    train_adapter,
    write_adapter,
    write_base,
    write_other_base,
)
from sftflow import checkpoint
from sftflow.exporting.merge import merge, told
from sftflow.fingerprint import weights_and_body_hash, weights_hash
from sftflow.foundation.atomic_io import sha256_file, with_checksum, write_json
from sftflow.foundation.errors import CheckpointError, ProofError, RecipeError
from sftflow.tasks import make_task
from sftflow.tasks.task import TaskSource

peft = pytest.importorskip("peft", reason="adapters: pip install peft")

CLM = {"task_type": "CAUSAL_LM"}
BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "bias": lambda: lora(bias="all"),
    "bias of adapted layers": lambda: lora(bias="lora_only"),
    "bias of its own": lambda: lora(lora_bias=True),
    "saved embedding": lambda: lora(modules_to_save=["embed_tokens"]),
    "saved head": lambda: lora(modules_to_save=["lm_head"]),
    "saved both": lambda: lora(modules_to_save=BOTH),
    "saved both, tied": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tokens": lambda: lora(trainable_token_indices=[5, 9, 17]),
    "tokens of both": lambda: lora(trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [7]}),
    "tokens below a head": lambda: lora(trainable_token_indices=[5, 9], target_modules=["q_proj", "lm_head"]),
    "head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "embedding and head": lambda: lora(target_modules=["q_proj", *BOTH]),
    "embedding and head, tied": lambda: lora(target_modules=["q_proj", *BOTH], ensure_weight_tying=True),
    "dora on both": lambda: lora(target_modules=BOTH, use_dora=True),
    "all-linear": lambda: lora(target_modules="all-linear"),
    "patterns": lambda: lora(target_modules=[*QV, "down_proj"], rank_pattern={"q_proj": 8}, alpha_pattern={"up": 3}),
    "some layers": lambda: lora(layers_to_transform=[1]),
    "a layer twice": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
    "parameters": lambda: lora(target_parameters=["self_attn.k_proj.weight"]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=QV, **CLM),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=QV, **CLM),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CLM),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=QV, **CLM),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], **CLM),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=16, topk=2, target_modules=["q_proj"], **CLM),
    "trained tokens": lambda: peft.TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"], **CLM),
}
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[bool, Path]:
    """A base with tied ends, and one without."""
    from transformers import AutoTokenizer

    tokenizer, folder = AutoTokenizer.from_pretrained(tokenizer_dir), tmp_path_factory.mktemp("bases")
    return {tied: write_base(folder / f"tied-{tied}", tokenizer, tied=tied) for tied in (True, False)}


def read(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


def edit_weights(adapter: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    edit_model(adapter, change, "adapter_model.safetensors")


def edit_model(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], file: str = "model.safetensors"
) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / file
    save_file({key: weight.contiguous() for key, weight in change(load_file(path)).items()}, path, {"format": "pt"})


@TIED
@pytest.mark.parametrize("kind", KINDS)
def test_merged_computes_what_peft_does(tmp_path: Path, bases: dict[bool, Path], kind: str, tied: bool) -> None:
    own = write_adapter(tmp_path / "adapter", bases[tied], KINDS[kind]())
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    merged, base = read(tmp_path / "merged"), read(bases[tied])
    assert off_by(merged, own) < 1e-5
    assert off_by(base, own) > 0.01  # it has an effect
    embedding, head = (end.weight for end in (merged.get_input_embeddings(), merged.get_output_embeddings()))
    assert merged.config.tie_word_embeddings == (tied and torch.equal(embedding, head))
    assert embedding.shape == base.get_input_embeddings().weight.shape


OTHERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "transposed": ("gpt2", lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "transposed, said wrongly": ("gpt2", lambda: lora(target_modules=["c_attn"])),
    "experts": ("qwen3_moe", lambda: lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "experts and router": ("qwen3_moe", lambda: lora(target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"])),
    "fused": ("phi3", lambda: lora(target_modules=["qkv_proj", "gate_up_proj"], use_rslora=True)),
    "scaled embedding": ("gemma3_text", lambda: lora(target_modules=["q_proj", "embed_tokens"])),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_architectures(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    architecture, config = OTHERS[kind]
    base = write_other_base(tmp_path / "base", AutoTokenizer.from_pretrained(tokenizer_dir), architecture)
    own = write_adapter(tmp_path / "adapter", base, config())
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert off_by(read(tmp_path / "merged"), own) < 1e-5 and off_by(read(base), own) > 0.01


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4"])
def test_a_start_that_was_converted_is_plain(tmp_path: Path, bases: dict[bool, Path], start: str) -> None:
    """peft's way of keeping an adapter whose start changed the base: the difference, of twice the rank."""
    wrapped = peft.get_peft_model(read(bases[True]), lora(init_lora_weights=True))
    wrapped.peft_config["default"].init_lora_weights = start
    for module in [m for m in wrapped.modules() if hasattr(m, "pissa_init")]:
        module.pissa_init("default", start)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = start
    randomise((p for p in wrapped.parameters() if p.requires_grad), 0.2)
    own = logits(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert off_by(read(tmp_path / "merged"), own) < 1e-5


# ---- new tokens


def grown(base: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>"]})
    return tokenizer


def new(tokenizer: Any, *ends: str) -> Any:
    ids = list(range(len(tokenizer) - 3, len(tokenizer)))
    return lora(trainable_token_indices=dict.fromkeys(ends, ids) if ends else ids)


GROWN: dict[str, tuple[Callable[[Any], Any], bool, dict[bool, str]]] = {
    # config, whether embeddings are saved, and what is missing where the ends are tied (True), or not
    "saved": (lambda _: lora(), True, {}),
    "not saved": (lambda _: lora(), False, {True: "input embedding", False: "input embedding"}),
    "both modules": (lambda _: lora(modules_to_save=BOTH), False, {}),
    "one module": (lambda _: lora(modules_to_save=["embed_tokens"]), False, {True: "head", False: "head"}),
    "one module and all": (lambda _: lora(modules_to_save=["embed_tokens"]), True, {}),
    "trained": (new, False, {False: "head"}),
    "trained in both": (lambda tokenizer: new(tokenizer, *BOTH), False, {}),
}


@TIED
@pytest.mark.parametrize("kind", GROWN)
def test_rows_of_new_tokens_are_the_adapters(tmp_path: Path, bases: dict[bool, Path], kind: str, tied: bool) -> None:
    config, saved, missing = GROWN[kind]
    tokenizer, out = grown(bases[tied]), tmp_path / "merged"
    own = write_adapter(
        tmp_path / "adapter",
        bases[tied],
        config(tokenizer),
        tokenizer=tokenizer,
        prepare=lambda model: model.resize_token_embeddings(len(tokenizer)),
        save_embeddings=saved,
    )
    if tied in missing:
        with pytest.raises(CheckpointError, match=f"the new rows of the {missing[tied]} are not in the adapter"):
            merge(str(tmp_path / "adapter"), out)
        assert not out.exists()
        return
    merge(str(tmp_path / "adapter"), out)
    assert off_by(read(out), own) < 1e-5
    assert len(checkpoint.load_tokenizer(checkpoint.resolve(str(out)))) == len(tokenizer)


# ---- what other trainers write


def unsloth(adapter: Path, base: Path) -> None:
    """A token for padding that the base has no row for, its own word in the config, targets as a pattern."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<|PAD_TOKEN|>"})
    tokenizer.save_pretrained(adapter)
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    pattern = r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn).*?(?:q_proj|v_proj).*?)"
    edit_config(adapter, auto_mapping=mapping | {"unsloth_fixed": True}, target_modules=pattern)


def axolotl(adapter: Path, base: Path) -> None:
    """The base's config beside the adapter."""
    shutil.copy(base / "config.json", adapter)
    shutil.copy(base / "tokenizer.json", adapter)
    shutil.copy(base / "tokenizer_config.json", adapter)


def llama_factory(adapter: Path, base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, pad_token="<|end|>", padding_side="right")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(adapter)
    for name in ("all_results.json", "trainer_state.json", "trainer_log.jsonl"):
        (adapter / name).write_text("{}")


def years_ago(adapter: Path, base: Path) -> None:
    """As peft 0.6 wrote its config: without the keys of later versions."""
    path, later = adapter / "adapter_config.json", {"peft_version", "use_dora", "exclude_modules", "lora_bias"}
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in later and "_config" not in k}))


LAYOUTS = {layout.__name__: layout for layout in (unsloth, axolotl, llama_factory, years_ago)}


@TIED
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_other_trainers_write_is_read(tmp_path: Path, bases: dict[bool, Path], layout: str, tied: bool) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    own = write_adapter(adapter, bases[tied], lora())
    LAYOUTS[layout](adapter, bases[tied])
    merge(str(adapter), out)
    merged, old = read(out), own.shape[-1]
    assert len(checkpoint.load_tokenizer(checkpoint.resolve(str(out)))) <= merged.get_input_embeddings().num_embeddings
    with torch.inference_mode():
        assert float((merged(IDS).logits[..., :old] - own[:, : IDS.shape[1]]).abs().max() / own.abs().max()) < 1e-5


def test_a_base_in_four_bits_is_not_merged_into(tmp_path: Path, bases: dict[bool, Path]) -> None:
    """Unsloth names the base that it trained on: the whole one is to be named."""
    write_adapter(tmp_path / "adapter", bases[True], lora())
    four = Path(shutil.copytree(bases[True], tmp_path / "base-bnb-4bit"))
    config, how = json.loads((four / "config.json").read_text()), {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (four / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(four))
    with pytest.raises(CheckpointError, match=r"quantised \(bitsandbytes\).*name the full base: .* --base BASE"):
        checkpoint.load_assistant(str(tmp_path / "adapter"))
    merge(str(tmp_path / "adapter"), tmp_path / "merged", base=str(bases[True]))


@TIED
def test_several_adapters_lie_in_folders(tmp_path: Path, bases: dict[bool, Path], tied: bool) -> None:
    wrapped = peft.get_peft_model(read(bases[tied]), lora(), adapter_name="one")
    wrapped.add_adapter("two", lora(r=8, use_rslora=True))
    randomise((p for key, p in wrapped.named_parameters() if "lora_" in key), 0.2)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no model in it, but in one, two; name one of them: .*two$"):
        checkpoint.resolve(str(tmp_path))
    for name in ("one", "two"):
        wrapped.set_adapter(name)
        own = logits(wrapped.eval())
        assert off_by(checkpoint.load_model(checkpoint.resolve(str(tmp_path / name)))[0], own) < 1e-5


@pytest.mark.slow
@TIED
@pytest.mark.parametrize("kind", ["defaults", "all-linear", "ends"])
def test_what_trl_trains_is_read(tmp_path: Path, bases: dict[bool, Path], kind: str, tied: bool) -> None:
    """Two steps of its SFTTrainer, its last and a saved state: merged, they compute what peft does."""
    pytest.importorskip("trl", reason="TRL's trainer: pip install trl")
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    configs = {"defaults": {}, "all-linear": {"target_modules": "all-linear"}, "ends": {"modules_to_save": BOTH}}
    tokenizer = AutoTokenizer.from_pretrained(bases[tied])
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"yo {n}"}]} for n in "abcd"
    ]
    options = {
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    trainer = SFTTrainer(
        read(bases[tied]),
        SFTConfig(output_dir=str(tmp_path / "run"), disable_tqdm=True, per_device_train_batch_size=2, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, **CLM, **configs[kind]),
    )
    trainer.model.peft_config["default"].base_model_name_or_path = str(bases[tied])
    trainer.train()
    trainer.save_model()
    for saved in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        own = logits(peft.PeftModel.from_pretrained(read(bases[tied]), saved).eval())
        assert off_by(read(bases[tied]), own) > 1e-3
        assert off_by(checkpoint.load_model(checkpoint.resolve(str(saved)))[0], own) < 1e-5
        checkpoint.load_assistant(str(saved))


# ---- what is no whole adapter of its base


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda adapter: edit_weights(adapter, lambda weights: {k.replace(old, new): v for k, v in weights.items()})


def without(part: str) -> Callable[[Path], None]:
    return lambda adapter: edit_weights(adapter, lambda weights: {k: v for k, v in weights.items() if part not in k})


def scaled(by: float) -> Callable[[Path], None]:
    return lambda adapter: edit_weights(adapter, lambda weights: {k: v * by for k, v in weights.items()})


def cut(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def pointer(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def beside_a_model(adapter: Path) -> None:
    (adapter / "model.safetensors").write_bytes(b"")


PLACE = "base_model.model.model.layers.0.self_attn"
WRONG: dict[str, tuple[Callable[[], Any], Callable[[Path], None], str]] = {
    "compiled": (
        lora,
        renamed("model.model.", "model._orig_mod.model."),
        r"no place for .*\(and 7 more\); take '_orig_mod.' out",
    ),
    "without a level": (lora, renamed("model.model.", "model."), "the base has no place for"),
    "another model's": (lora, renamed("self_attn", "attention"), "the base has no place for .*attention.q_proj"),
    "one key more": (
        lora,
        lambda a: edit_weights(a, lambda w: w | {"base_model.model.extra.lora_A.weight": torch.ones(4, 4)}),
        "the base has no place for base_model.model.extra.lora_A.weight;",
    ),
    "half": (lora, without("layers.1."), r"it leaves out .*layers.1.self_attn.q_proj.lora_A.weight \(and 3"),
    "one end": (lora, without("q_proj.lora_B"), f"it leaves out {PLACE}.q_proj.lora_B.weight"),
    "no magnitudes": (lambda: lora(use_dora=True), without("magnitude"), "it leaves out .*magnitude_vector"),
    "no biases": (lambda: lora(bias="all"), without(".bias"), "it leaves out .*k_proj.bias"),
    "no saved head": (lambda: lora(modules_to_save=["lm_head"]), without("lm_head"), "it leaves out .*lm_head.weight"),
    "no tokens": (lambda: lora(trainable_token_indices=[5]), without("token"), "it leaves out .*trainable_tokens"),
    "another rank": (lora, lambda a: edit_config(a, r=8), "q_proj.lora_A.weight is 4 x 32, in the base 8 x 32"),
    "not finite": (lora, scaled(float("inf")), "its weights are not finite"),
    "cut short": (lora, cut, "adapter_model.safetensors: damaged"),
    "empty": (lora, without(""), "it holds no weights"),
    "pickled": (lora, pickled, "no adapter_model.safetensors in it, but adapter_model.bin; pickled weights are not"),
    "no weights": (
        lora,
        lambda a: (a / "adapter_model.safetensors").unlink(),
        "in it: no weights at all; copy the whole adapter",
    ),
    "a pointer": (lora, pointer, "a Git LFS pointer, not the weights; get the file itself: git lfs pull"),
    "unknown type": (lora, lambda a: edit_config(a, peft_type="NEWER"), "knows no adapter of type 'NEWER'"),
    "unknown option": (lora, lambda a: edit_config(a, use_newer=True), "it asks for use_newer, which peft"),
    "a classifier": (lora, lambda a: edit_config(a, task_type="SEQ_CLS"), "it was trained for SEQ_CLS"),
    "a model, too": (lora, beside_a_model, "it holds a model .model.safetensors. and an adapter"),
    "a start at random": (
        lambda: lora(init_lora_weights="pissa_niter_4"),
        lambda _: None,
        r"at its start \(pissa_niter_4\) the base was changed.*path_initial_model_for_weight_conversion",
    ),
    "alora": (lambda: lora(alora_invocation_tokens=[5]), lambda _: None, "type aLoRA cannot be merged"),
    "prefix": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CLM),
        lambda _: None,
        "type PREFIX_TUNING cannot be merged",
    ),
    "prompt": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CLM),
        lambda _: None,
        "type PROMPT_TUNING cannot be merged",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, bases: dict[bool, Path], kind: str) -> None:
    config, spoil, fact = WRONG[kind]
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    write_adapter(adapter, bases[True], config())
    spoil(adapter)
    with pytest.raises(CheckpointError, match=fact) as error:
        merge(str(adapter), out)
    assert error.value.exit_code == 2 and str(adapter) in str(error.value) and not out.exists()
    with pytest.raises(CheckpointError, match=fact):
        checkpoint.load_assistant(str(adapter))


def test_a_merge_that_computes_something_else_is_refused(
    tmp_path: Path, bases: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that peft adds at the wrong scale: an accident, made here by hand."""
    from peft.tuners.lora.layer import Linear

    own = Linear.get_delta_weight
    write_adapter(tmp_path / "adapter", bases[True], lora())
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *args: own(*args) * 1.01)
    with pytest.raises(ProofError, match="merged, its logits are off by") as error:
        merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert error.value.exit_code == 1 and not (tmp_path / "merged").exists()


def test_two_versions_of_a_shared_weight_are_refused(tmp_path: Path, bases: dict[bool, Path]) -> None:
    """As saved from a base whose ends were parted before training."""
    adapter = tmp_path / "adapter"
    write_adapter(adapter, bases[True], lora(), save_embeddings=True)
    key = "base_model.model.lm_head.weight"
    edit_weights(adapter, lambda weights: weights | {key: weights[key] + 1})
    with pytest.raises(CheckpointError, match="two versions of a weight that the base has once"):
        merge(str(adapter), tmp_path / "merged")


# ---- what storing costs


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_what_is_stored_is_as_near_as_is_told(tmp_path: Path, bases: dict[bool, Path], kind: str) -> None:
    """The largest difference of a logit, merged and as stored, on the very ids; told and written down."""
    write_adapter(tmp_path / "adapter", bases[True], lora())
    _, unmerged = checkpoint.load_merged(checkpoint.resolve(str(tmp_path / "adapter")))
    found = merge(str(tmp_path / "adapter"), tmp_path / "merged", kind=kind)
    off = unmerged.off_by(read(tmp_path / "merged"))
    assert off == pytest.approx(found["stored_off_by"], rel=0.01, abs=1e-5) and off < found["bounds"]["stored"]
    assert found["merged_off_by"] < 1e-5 < found["moved_by_adapter"]
    assert {"f32": off < 1e-5, "f16": 1e-4 < off < 0.1, "bf16": 1e-3 < off < 1}[kind]
    assert json.loads((tmp_path / "merged" / "sftflow.json").read_text())["merged"] == found
    assert f"{off:.1e} stored as {kind} (allowed" in told(found)


def test_what_storing_would_lose_is_refused(tmp_path: Path, bases: dict[bool, Path]) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    write_adapter(adapter, bases[True], lora())
    edit_weights(adapter, lambda weights: {key: w * 1e-3 for key, w in weights.items()})  # a millionth of a change
    with pytest.raises(
        ProofError, match=r"stored as bf16.* the adapter itself moves them by .*; .* --type f32"
    ) as error:
        merge(str(adapter), out, kind="bf16")
    assert error.value.exit_code == 1 and not out.exists()
    merge(str(adapter), out, kind="f32")
    edit_weights(adapter, lambda weights: {key: w * 1e6 for key, w in weights.items()})  # more than fp16 can hold
    with pytest.raises(ProofError, match="stored as f16, its logits are off by nan of the largest one"):
        merge(str(adapter), out, kind="f16")


@pytest.mark.slow
def test_fifty_greedy_replies_merged_and_unmerged(tmp_path: Path) -> None:
    """Of the shipped base with an adapter that was trained for thirty steps: what peft's own model replies beside the
    base, token for token, is what the merged checkpoint does, but where two tokens are as likely as each other."""
    from sftflow.exporting.bounds import TOKENS
    from sftflow.exporting.parity_prompts import cases

    assistant = checkpoint.load_assistant("builtin:tiny")
    renderer, base = assistant.renderer, tmp_path / "base"
    checkpoint.save(base, assistant.model, assistant.tokenizer, renderer, dtype=torch.bfloat16, meta={})
    prompts = [case.rendered.ids.tolist() for case in cases(renderer, 50, 400)]
    task = make_task("arithmetic", TaskSource(limit=120))
    rows = [renderer.render(conversation) for conversation in task.conversations()[:120]]
    wrapped = train_adapter(read(base), rows, steps=30)
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = [greedy(wrapped, ids, TOKENS) for ids in prompts]
    near = {}
    for kind, close in {"f32": 1e-3, "bf16": 0.3}.items():
        found = merge(str(tmp_path / "adapter"), tmp_path / kind, kind=kind)
        assert found["moved_by_adapter"] > 1
        merged, near[kind] = read(tmp_path / kind), 0
        for ids, (reply, lead) in zip(prompts, wanted, strict=True):
            ours = greedy(merged, ids, TOKENS)[0]
            parted = next((i for i, (a, b) in enumerate(zip(reply, ours, strict=True)) if a != b), None)
            near[kind] += parted is not None
            assert parted is None or lead[parted] < close
    print(f"near ties in 50 replies of {TOKENS} tokens: {near}")
    assert near["f32"] == 0 and len({tuple(reply) for reply, _ in wanted}) > 25


# ---- nothing else changes


def test_a_merge_changes_nothing_unasked(tmp_path: Path, tokenizer_dir: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    base = write_base(
        tmp_path / "base", tokenizer, tied=True, dtype=torch.bfloat16, eos_token_id=[1, 3], do_sample=True, top_p=0.9
    )
    write_adapter(tmp_path / "adapter", base, lora())
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    parts = [load_file(p / "model.safetensors") for p in (base, tmp_path / "merged")]
    before, after = ({key: (w.shape, w.dtype) for key, w in part.items()} for part in parts)
    assert after == before
    asked, kept = (GenerationConfig.from_pretrained(p).to_diff_dict() for p in (base, tmp_path / "merged"))
    assert kept == asked and kept["eos_token_id"] == [1, 3] and kept["top_p"] == 0.9
    same, config = (json.loads((p / "config.json").read_text()) for p in (base, tmp_path / "merged"))
    assert {key: config[key] for key in same} == same  # older readers' words for it may stand beside that
    old, now = (AutoTokenizer.from_pretrained(p) for p in (base, tmp_path / "merged"))
    assert now.get_vocab() == old.get_vocab() and now.chat_template is None
    checkpoint.load_assistant(str(tmp_path / "merged"))  # asked in our format, as its base would be


def test_the_dtype_is_that_of_the_bases_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    write_base(base, AutoTokenizer.from_pretrained(tokenizer_dir), tied=True, dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "dtype"}))
    write_adapter(tmp_path / "adapter", base, lora())
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert {w.dtype for w in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_format_of_a_trained_base_is_kept(tmp_path: Path, tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    assert runs.run("train", str(runs.write_recipe(tmp_path, tiny_base, steps=1))).returncode == 0
    run = tmp_path / "run"
    write_adapter(tmp_path / "adapter", run / "checkpoint", lora())
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    before, after = (json.loads((p / "sftflow.json").read_text()) for p in (run / "checkpoint", tmp_path / "merged"))
    assert [after[key] for key in ("format", "fingerprint", "dtype")] == [
        before[key] for key in ("format", "fingerprint", "dtype")
    ]
    checkpoint.load_assistant(str(tmp_path / "merged"))
    # A tokenizer beside the adapter that has the base's template has its format, too: the calculator stands in no file.
    AutoTokenizer.from_pretrained(run / "checkpoint").save_pretrained(tmp_path / "adapter")
    formats = [checkpoint.load_assistant(str(p)).renderer.format for p in (run, tmp_path / "adapter")]
    assert formats[0] == formats[1] and formats[0].python


# ---- an adapter's directory is a model


@pytest.fixture
def adapter(tmp_path: Path, bases: dict[bool, Path]) -> tuple[Path, torch.Tensor]:
    """An adapter of the tied base on its head, without a tokenizer; and its logits."""
    return tmp_path / "adapter", write_adapter(tmp_path / "adapter", bases[True], KINDS["head"]())


@pytest.mark.parametrize("shape", ["alone", "with a tokenizer", "in a run"])
def test_an_adapter_is_its_base_with_it(
    tmp_path: Path, bases: dict[bool, Path], adapter: tuple[Path, torch.Tensor], shape: str
) -> None:
    directory, own = adapter
    if shape == "with a tokenizer":
        grown(bases[True]).save_pretrained(directory)
        (directory / "tokenizer.json").write_bytes((bases[True] / "tokenizer.json").read_bytes())
    if shape == "in a run":
        directory = shutil.move(directory, tmp_path / "run" / "checkpoint").parent
    model, info = checkpoint.load_model(checkpoint.resolve(str(directory)))
    assert off_by(model, own) < 1e-5 and all(p.requires_grad for p in model.parameters())
    assert info["base"]["name"] == str(bases[True])
    assistant = checkpoint.load_assistant(str(directory))
    assert torch.allclose(logits(assistant.model)[..., :5, :300], logits(model)[..., :5, :300])
    assert weights_hash(assistant.model) != weights_hash(checkpoint.load_assistant(str(bases[True])).model)


def test_an_adapter_of_an_adapter(tmp_path: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    first, _ = adapter
    merge(str(first), tmp_path / "merged")
    own = write_adapter(tmp_path / "second", tmp_path / "merged", lora(use_rslora=True))
    edit_config(tmp_path / "second", base_model_name_or_path=str(first))
    assert off_by(checkpoint.load_model(checkpoint.resolve(str(tmp_path / "second")))[0], own) < 1e-4


def test_where_the_base_is(tmp_path: Path, bases: dict[bool, Path], adapter: tuple[Path, torch.Tensor]) -> None:
    directory, own = adapter
    shutil.copytree(bases[True], tmp_path / "models" / "mine")
    edit_config(directory, base_model_name_or_path="models/mine")  # from the folder that holds the adapter
    assert off_by(checkpoint.load_model(checkpoint.resolve(str(directory)))[0], own) < 1e-5
    (tmp_path / "stopped" / "resume").mkdir(parents=True)
    facts = {
        "./gone/mine": "gone/mine: no such .*the base of .*; put it there, or name the base",
        "./stopped": "stopped: this run has not finished .*; finish it: .*--resume, or name the base",
        "": "the adapter names no base",
    }
    for name, fact in facts.items():
        edit_config(directory, base_model_name_or_path=name)
        with pytest.raises(CheckpointError, match=fact) as error:
            checkpoint.load_assistant(str(directory))
        assert "--base BASE" in str(error.value)
        merge(str(directory), tmp_path / "merged", base=str(bases[True]))
    edit_config(directory, base_model_name_or_path=str(directory))
    with pytest.raises(CheckpointError, match="its base is an adapter of itself"):
        checkpoint.load_assistant(str(directory))
    config = tmp_path / "models" / "mine" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    edit_config(directory, base_model_name_or_path="models/mine")
    with pytest.raises(CheckpointError, match=r"models/mine: its weights are quantised \(awq\)"):
        checkpoint.load_assistant(str(directory))


def trained_here(adapter: Path, base: Path) -> None:
    """The record that training writes beside an adapter."""
    model = checkpoint.load_model(checkpoint.resolve(str(base)))[0]
    files = {p.name: sha256_file(p) for p in adapter.iterdir()}
    record = {"kind": "sft", "base": {"name": str(base), "body": weights_and_body_hash(model)[1]}, "sha256": files}
    write_json(adapter / "sftflow.json", with_checksum(record))


def test_the_base_is_checked_by_its_recorded_hash(tmp_path: Path, bases: dict[bool, Path]) -> None:
    adapter, base = tmp_path / "adapter", Path(shutil.copytree(bases[True], tmp_path / "base"))
    own = write_adapter(adapter, base, lora())
    trained_here(adapter, base)
    model, info = checkpoint.load_model(checkpoint.resolve(str(adapter)))
    assert off_by(model, own) < 1e-5 and info["base"]["body"] and info["kind"] == "sft"
    edit_model(base, lambda weights: weights | {"model.norm.weight": weights["model.norm.weight"] + 1e-3})
    fact = r"its base .*/base is not the one that it was trained on \(weights [0-9a-f]+ -> [0-9a-f]+\); .*--base BASE"
    for attempt in (lambda: checkpoint.load_assistant(str(adapter)), lambda: merge(str(adapter), tmp_path / "merged")):
        with pytest.raises(CheckpointError, match=fact):
            attempt()
    merge(str(adapter), tmp_path / "merged", base=str(bases[True]))
    edit_weights(adapter, lambda weights: {key: w * 2 for key, w in weights.items()})
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors: changed"
    ):  # nor is the adapter what was saved
        checkpoint.load_assistant(str(adapter))


def test_folders_that_moved_together(tmp_path: Path, bases: dict[bool, Path]) -> None:
    """A base that is gone from its place is looked for above a run that recorded its hash."""
    base = Path(shutil.copytree(bases[True], tmp_path / "old" / "models" / "mine"))
    adapter = tmp_path / "old" / "runs" / "a" / "checkpoint"
    own = write_adapter(adapter, base, lora())
    trained_here(adapter, base)
    (tmp_path / "old").rename(tmp_path / "new")
    run = tmp_path / "new" / "runs" / "a"
    assert off_by(checkpoint.load_model(checkpoint.resolve(str(run)))[0], own) < 1e-5
    (tmp_path / "new" / "models" / "mine").rename(tmp_path / "new" / "mine")
    assert off_by(checkpoint.load_model(checkpoint.resolve(str(run)))[0], own) < 1e-5
    (tmp_path / "new" / "mine").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"old/models/mine: no such"):
        checkpoint.load_assistant(str(run))
    edit_config(run / "checkpoint", base_model_name_or_path=str(tmp_path / "elsewhere"))  # as the error says
    assert off_by(checkpoint.load_model(checkpoint.resolve(str(run)))[0], own) < 1e-5
    edit_config(run / "checkpoint", lora_alpha=9)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: changed since it was saved"):
        checkpoint.load_assistant(str(run))


def test_base_and_adapter_are_not_replaced(tmp_path: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    directory, _ = adapter
    merge(str(directory), tmp_path / "merged")
    write_adapter(tmp_path / "second", tmp_path / "merged", lora())
    for out in (tmp_path / "merged", tmp_path / "second"):
        with pytest.raises(RecipeError, match="name another folder"):
            merge(str(tmp_path / "second"), out)


def test_without_peft(adapter: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # what Python itself understands as "not there"
    with pytest.raises(CheckpointError, match=r"which needs the package peft; pip install 'sftflow\[lora\]'"):
        checkpoint.load_assistant(str(adapter[0]))


def test_every_command_takes_an_adapter(tmp_path: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    """Its rows are rendered, it answers, is graded apart from its base, exported, and trained further."""
    directory, _ = adapter
    name, base = str(directory), checkpoint.resolve(str(directory)).adapter_of
    recipe = runs.write_recipe(tmp_path, directory, steps=2)
    rows = str(tmp_path / "rows.jsonl")
    assert runs.run("render", rows, "--model", name).returncode == 0
    assert runs.run("mix", str(recipe)).returncode == 0
    assert runs.run("chat", name, "--prompt", "hi").returncode == 0
    graded = runs.run("eval", str(base), name, "--tasks", "spelling", "--limit", "2", "--out", str(tmp_path / "graded"))
    assert graded.returncode == 0, graded.stderr
    hashes = {json.loads(p.read_text())["checkpoint"] for p in (tmp_path / "graded").rglob("*.meta.json")}
    assert len(hashes) == 2
    trained = runs.run("train", str(recipe))
    assert trained.returncode == 0 and "with the adapter merged into it" in trained.stderr
    exported = runs.run("export", name, "--to", "gguf", "--type", "f32", "--out", str(tmp_path / "a.gguf"))
    assert exported.returncode == 0, exported.stderr
