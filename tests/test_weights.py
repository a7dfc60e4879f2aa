"""Loading accounts for every tensor: what is missing, strange, of another shape, an integer or not finite is an error
that names it, whichever command reads the checkpoint; what a model class itself leaves out is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sftflow as sf
from helpers.architectures import ARCHITECTURES, REFUSED, SMALL, STATEFUL, stateful, tiny
from helpers.runs import run, write_recipe
from sftflow.checkpoint import load_model, resolve
from sftflow.checkpoint.weights import load_weights
from sftflow.foundation.errors import CheckpointError

State = dict[str, torch.Tensor]
NORM, DOWN, HEAD = "model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"


def without(*keys: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if k not in keys}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {(new + k.removeprefix(old) if k.startswith(old) else k): v for k, v in state.items()}


def with_tensor(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, key: make(state.get(key, torch.ones(4)))}


def poisoned(key: str, value: float) -> Callable[[State], State]:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return with_tensor(key, poison)


WRONG: dict[str, tuple[Callable[[State], State], str]] = {
    "one is missing": (without(DOWN), f"1 of the .* tensors of LlamaForCausalLM are missing: {DOWN}"),
    "the head is missing": (without(HEAD), f"missing: {HEAD}; .*tie_word_embeddings"),
    "the last norm is missing": (without(NORM), f"missing: {NORM}"),
    "a layer is missing": (lambda s: {k: v for k, v in s.items() if ".layers.1." not in k}, "missing: .* and 6 more"),
    "a letter differs": (renamed(NORM, "model.nOrm.weight"), f"missing: {NORM} \\(and it has model.nOrm.weight\\)"),
    "wrapped by an adapter": (renamed("model.", "base_model.model.model."), "missing: .*it has base_model.model.model"),
    "under a tower's name": (renamed("model.", "language_model."), "missing: .*it has language_model"),
    "half of it wrapped": (renamed("model.layers.0.", "_orig_mod.model.layers.0."), "missing: .*it has _orig_mod"),
    "another shape": (with_tensor(DOWN, lambda t: t[:, 1:].contiguous()), f"{DOWN} is 32x63, where .* asks for 32x64"),
    "fewer rows": (with_tensor(HEAD, lambda t: t[:300].contiguous()), f"{HEAD} is 300x32, where"),
    "one too many": (with_tensor("v_head.weight", torch.clone), "no place for 1 of its tensors: v_head.weight"),
    "a layer too many": (with_tensor("model.layers.2.mlp.up_proj.weight", torch.clone), "no place for .*layers.2.mlp"),
    "a bias too many": (with_tensor("model.layers.0.mlp.up_proj.bias", torch.clone), "no place for .*up_proj.bias"),
    "one under two names": (
        with_tensor("norm.weight", torch.clone),
        f"one tensor under two names, norm.weight and {NORM}",
    ),
    "integers": (with_tensor(DOWN, lambda t: (t * 100).to(torch.int8)), f"{DOWN} is stored as integers"),
    "a NaN": (poisoned(DOWN, float("nan")), f"not finite \\({DOWN}\\)"),
    "an infinity": (poisoned("model.embed_tokens.weight", float("-inf")), "not finite \\(model.embed_tokens.weight\\)"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A Llama with a head of its own, in one file."""
    import transformers
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("whole")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def changed(whole: Path, target: Path, change: Callable[[State], State], *, shards: bool = False) -> Path:
    """A copy with other tensors, in one file or in two shards."""
    shutil.copytree(whole, target)
    state = {k: v.contiguous() for k, v in change(load_file(whole / "model.safetensors")).items()}
    if not shards:
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        return target
    (target / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number in (0, 1):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = {key: state[key] for key in sorted(state)[number::2]}
        save_file(part, target / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return target


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_whole_is_refused_by_name(whole: Path, tmp_path: Path, kind: str, shards: bool) -> None:
    change, words = WRONG[kind]
    base = changed(whole, tmp_path / "base", change, shards=shards)
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(resolve(str(base)))
    assert str(error.value).startswith(f"{base}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["one is missing", "a letter differs", "another shape", "one too many", "a NaN"])
@pytest.mark.parametrize("command", ["train", "chat", "serve", "eval", "compare", "export", "the Python door"])
def test_every_command_that_loads_refuses(whole: Path, tmp_path: Path, command: str, kind: str) -> None:
    base = str(changed(whole, tmp_path / "base", WRONG[kind][0]))
    out = tmp_path / "out"
    arguments = {
        "train": ["train", str(write_recipe(tmp_path, Path(base)))],
        "chat": ["chat", base, "--prompt", "hi"],
        "serve": ["serve", base, "--port", "0"],
        "eval": ["eval", base, "--tasks", "arithmetic", "--limit", "2", "--out", str(out)],
        "compare": ["compare", "builtin:tiny", base, "--tasks", "arithmetic", "--limit", "2", "--out", str(out)],
        "export": ["export", base, "--to", "gguf", "--out", str(out / "m.gguf")],
    }
    if command == "the Python door":
        with pytest.raises(sf.SftflowError, match=WRONG[kind][1]):
            sf.load(base)
        return
    if command == "export":
        pytest.importorskip("gguf")
    result = run(*arguments[command])
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {base}: ") and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists() and not list(out.rglob("*.json*")) and not list(out.rglob("*.gguf"))


def test_a_shard_index_that_leaves_a_tensor_out_or_a_shard_that_is_not_there(whole: Path, tmp_path: Path) -> None:
    base = changed(whole, tmp_path / "base", dict, shards=True)
    index = base / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    one = "model-00001-of-00002.safetensors"
    short = {k: v for k, v in listed["weight_map"].items() if v != one}
    index.write_text(json.dumps({"metadata": {}, "weight_map": short}))
    with pytest.raises(CheckpointError, match=r"tensors of LlamaForCausalLM are missing: "):
        load_model(resolve(str(base)))
    index.write_text(json.dumps(listed))
    load_model(resolve(str(base)))
    twice = next(key for key, shard in listed["weight_map"].items() if shard != one)
    both = load_file(base / one) | {twice: torch.ones(4)}
    save_file(both, base / one, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="stands in two of its shards"):
        load_model(resolve(str(base)))
    (base / one).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=f"base/{one}: a Git LFS pointer, not the weights; .*git lfs pull"):
        load_model(resolve(str(base)))
    (base / one).unlink()
    with pytest.raises(CheckpointError, match=f"base/{one}: this shard is missing"):
        load_model(resolve(str(base)))


def test_any_changed_byte_of_a_header_is_noticed(whole: Path, tmp_path: Path) -> None:
    """Every byte of the header's JSON, one after another: an error, or the same weights (a byte of the metadata)."""
    base = changed(whole, tmp_path / "base", dict)
    path = base / "model.safetensors"
    clean = path.read_bytes()
    wanted = load_model(resolve(str(base)))[0].state_dict()
    size = int.from_bytes(clean[:8], "little")
    refused = 0
    for at in range(8, 8 + size, 23):
        path.write_bytes(clean[:at] + bytes([clean[at] ^ 1]) + clean[at + 1 :])
        try:
            got = load_model(resolve(str(base)))[0].state_dict()
        except CheckpointError:
            refused += 1
            continue
        assert all(torch.equal(got[k], wanted[k]) for k in wanted), clean[at - 20 : at + 20]
    assert refused > 0.8 * len(range(8, 8 + size, 23))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod.", "model/_orig_mod"])
def test_what_wraps_a_model_is_read_away_and_said_once(
    whole: Path, tmp_path: Path, wrapper: str, caplog: pytest.LogCaptureFixture
) -> None:
    def wrap(state: State) -> State:
        if wrapper == "model/_orig_mod":  # the body alone was compiled
            return {k.replace("model.", "model._orig_mod."): v for k, v in state.items() if k != HEAD} | {
                "_orig_mod." + HEAD: state[HEAD]
            }
        return {wrapper + k: v for k, v in state.items()}

    base = changed(whole, tmp_path / "base", wrap)
    model = load_weights(base, "base")
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()
    got = model.state_dict()
    wanted = load_weights(whole, "whole").state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted)
    said = [r.getMessage() for r in caplog.records if r.name == "sftflow.checkpoint"]
    assert len(said) == 1 and "read away" in said[0]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_the_attention_it_was_trained_with_need_not_be_there(whole: Path, tmp_path: Path, key: str) -> None:
    base = changed(whole, tmp_path / "base", dict)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, key: "flash_attention_2"}))
    assert load_weights(base, "base").config._attn_implementation == "sdpa"


def test_tables_that_earlier_versions_saved_are_no_weights(whole: Path, tmp_path: Path) -> None:
    def with_tables(state: State) -> State:
        tables = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.rand(4) for n in (0, 1)}
        tables |= {f"model.layers.0.self_attn.rotary_emb.{part}_cached": torch.rand(8, 4) for part in ("cos", "sin")}
        tables |= {"model.embed_positions.weights": torch.rand(8, 32)}
        return {**state, **tables, "model.layers.0.self_attn.attn.masked_bias": torch.tensor(-1e4)}

    load_model(resolve(str(changed(whole, tmp_path / "base", with_tables))))


def test_the_towers_of_a_multimodal_checkpoint_are_left_unread_and_nothing_else(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    towers = {"vision_tower.layers.0.weight": torch.ones(4), "multi_modal_projector.weight": torch.ones(4)}
    base = changed(whole, tmp_path / "base", lambda state: {**state, **towers})
    with pytest.raises(CheckpointError, match="no place for 2 of its tensors"):
        load_weights(base, "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vision_config": {"hidden_size": 8}}))
    load_weights(base, "base")
    assert [r.getMessage() for r in caplog.records if r.name == "sftflow.checkpoint"] == [
        "note: base: its text model is meant; not read: multi_modal_projector, vision_tower"
    ]
    state = load_file(base / "model.safetensors")
    save_file(state | {"model.layers.7.mlp.up_proj.weight": torch.ones(4)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place for 1 of its tensors: model\.layers\.7"):
        load_weights(base, "base")


def test_real_towers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Llama 4's text model is read out of the multimodal checkpoint, its config and its names included; SmolVLM's
    cannot be, which is said in a line."""
    import transformers

    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**SMALL, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 64}
    sizes = {"image_size": 28, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = transformers.Llama4Config(text_config=text, vision_config={**vision, **sizes, "pixel_shuffle_ratio": 0.5})
    model = transformers.Llama4ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "llama4")
    loaded = load_weights(tmp_path / "llama4", "llama4")
    assert type(loaded).__name__ == "Llama4ForCausalLM"
    wanted = model.language_model.state_dict()
    assert all(torch.equal(weight, wanted[key]) for key, weight in loaded.state_dict().items())
    said = [r.getMessage() for r in caplog.records if r.name == "sftflow.checkpoint"]
    assert said == ["note: llama4: its text model is meant; not read: multi_modal_projector, vision_model"]
    llama = {**SMALL, "model_type": "llama"}
    smol = transformers.SmolVLMConfig(text_config=llama, vision_config={**vision, "image_size": 28, "patch_size": 14})
    transformers.SmolVLMForConditionalGeneration(smol).save_pretrained(tmp_path / "smolvlm")
    with pytest.raises(CheckpointError, match="transformers has no causal language model for a smolvlm; "):
        load_model(resolve(str(tmp_path / "smolvlm")))


@pytest.mark.parametrize("name", list(dict.fromkeys([*ARCHITECTURES, *REFUSED, *STATEFUL])))
def test_what_transformers_saves_is_whole(name: str, tmp_path: Path) -> None:
    model = stateful(name) if name in STATEFUL else tiny(name)
    model.save_pretrained(tmp_path)
    loaded = load_weights(tmp_path, name)
    wanted = model.state_dict()
    assert all(torch.equal(weight, wanted[key]) for key, weight in loaded.state_dict().items())


def test_a_head_of_its_own_is_kept_under_a_config_that_says_tied(whole: Path, tmp_path: Path) -> None:
    """By loading, growing by the format's tokens, training and saving; the config saved says so."""
    from transformers import AutoModelForCausalLM

    base = changed(whole, tmp_path / "base", with_tensor(HEAD, lambda t: t + 1.0))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    recipe = write_recipe(tmp_path, base, steps=2, lr=1e-9, optimizer="adamw")
    done = run("train", str(recipe))
    assert done.returncode == 0, done.stderr
    trained = tmp_path / "run" / "checkpoint"
    assert json.loads((trained / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits for folder in (base, trained)
        )
    assert after.shape[-1] > before.shape[-1]
    assert torch.allclose(after[..., : before.shape[-1]], before, atol=1e-3)
    once_more = load_model(resolve(str(tmp_path / "run")))[0]
    assert not once_more.config.tie_word_embeddings and once_more.lm_head.weight.mean() > 0.9


def test_a_head_that_is_the_embedding_is_stored_once(whole: Path, tmp_path: Path) -> None:
    """Also where a config in memory says otherwise: what the model is decides."""
    from sftflow.checkpoint import prepare, save

    base = changed(whole, tmp_path / "base", without(HEAD))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model, tokenizer, renderer, _ = prepare(resolve(str(base)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.config.tie_word_embeddings = False
    save(tmp_path / "saved", model, tokenizer, renderer, dtype=torch.float32, meta={})
    assert HEAD not in load_file(tmp_path / "saved" / "model.safetensors")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is True
    again = load_model(resolve(str(tmp_path / "saved")))[0]
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed, so that it loads")
def test_a_package_that_is_missing_is_the_remedy(tiny_base: Path, tmp_path: Path) -> None:
    """Not the files, which are whole."""
    directory = tmp_path / "quantised"
    shutil.copytree(tiny_base, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="bitsandbytes") as error:
        load_model(resolve(str(directory)))
    assert error.value.remedy.startswith("install that package; to train, give the base in bf16")
