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
from helpers.adapters import QV, logits, lora, off_by, write_adapter, write_base
from sftflow import checkpoint
from sftflow.exporting.merge import merge
from sftflow.fingerprint import weights_hash
from sftflow.foundation.errors import CheckpointError, ProofError, RecipeError

peft = pytest.importorskip("peft", reason="adapters: pip install peft")

CLM = {"task_type": "CAUSAL_LM"}
BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "bias": lambda: lora(bias="all"),
    "bias of its own": lambda: lora(lora_bias=True),
    "saved embedding": lambda: lora(modules_to_save=["embed_tokens"]),
    "saved head": lambda: lora(modules_to_save=["lm_head"]),
    "saved both": lambda: lora(modules_to_save=BOTH),
    "saved both, tied": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tokens": lambda: lora(trainable_token_indices=[5, 9, 17]),
    "tokens of both": lambda: lora(trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [7]}),
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
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(adapter: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({key: weight.contiguous() for key, weight in change(load_file(path)).items()}, path)


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
