"""What is saved here computes the same in transformers 4.57 and 5, and in llama.cpp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import older_reader
from helpers.tokenizers import KINDS, write_tokenizer
from sftflow import checkpoint
from sftflow.checkpoint.older_readers import spell_config
from sftflow.exporting import llamacpp
from sftflow.exporting.to_gguf import export_gguf

PLAIN = {"rope_type": "default", "rope_theta": 1234567.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 70000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 70000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 70000.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500000.0}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 10 for i in range(8)], "rope_theta": 10000.0,
        "long_factor": [2.0 + i / 3 for i in range(8)], "original_max_position_embeddings": 32}  # fmt: skip
LOCAL = {"rope_type": "default", "rope_theta": 20000.0}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

MODERNBERT = {"layer_types": WINDOWS["layer_types"], "local_attention": 12, "pad_token_id": 0, "bos_token_id": 0,
              "eos_token_id": 0}  # fmt: skip

# name: (model type, its rope, other values of its config, whether llama.cpp is given it, too)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "llama": ("llama", PLAIN, {}, True),
    "llama llama3 tied": ("llama", LLAMA3, {"tie_word_embeddings": True}, True),
    "llama linear": ("llama", LINEAR, {}, True),
    "llama dynamic": ("llama", DYNAMIC, {}, False),
    "llama longrope": ("llama", LONG, {}, False),
    "mistral": ("mistral", PLAIN, {"sliding_window": None}, True),
    "qwen2 tied": ("qwen2", PLAIN, {"tie_word_embeddings": True}, True),
    "qwen2 yarn": ("qwen2", YARN, {}, False),
    "qwen3 yarn tied": ("qwen3", YARN, {"tie_word_embeddings": True}, False),
    "qwen3": ("qwen3", PLAIN, {}, True),
    "qwen3_moe": ("qwen3_moe", PLAIN, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, False),
    "mixtral": ("mixtral", PLAIN, {"num_local_experts": 4}, False),
    "gemma3": ("gemma3_text", {"full_attention": LINEAR, "sliding_attention": LOCAL}, WINDOWS, False),
    "gemma2": ("gemma2", PLAIN, WINDOWS, False),
    "phi3": ("phi3", {**PLAIN, "partial_rotary_factor": 1.0}, {}, False),
    "phi3 longrope": ("phi3", {**LONG, "partial_rotary_factor": 1.0}, {"original_max_position_embeddings": 32}, False),
    "gpt_neox": ("gpt_neox", {**LINEAR, "partial_rotary_factor": 0.5}, {}, False),
    "gpt_neox_japanese": ("gpt_neox_japanese", {**LINEAR, "partial_rotary_factor": 0.5}, {}, False),
    "modernbert": ("modernbert-decoder", {"full_attention": PLAIN, "sliding_attention": PLAIN}, MODERNBERT, False),
    "olmo2": ("olmo2", PLAIN, {}, False),
    "olmo2 linear": ("olmo2", LINEAR, {}, False),
    "olmo3": ("olmo3", {"full_attention": YARN, "sliding_attention": LOCAL | {"rope_theta": 70000.0}}, WINDOWS, False),
    "smollm3": ("smollm3", YARN, {}, False),
    "stablelm": ("stablelm", {**PLAIN, "partial_rotary_factor": 0.5}, {}, False),
    "phi": ("phi", {**DYNAMIC, "partial_rotary_factor": 0.5}, {}, False),
    "granite": ("granite", LLAMA3, {}, False),
    "cohere2": ("cohere2", PLAIN, WINDOWS, False),
    "gpt2": ("gpt2", {}, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, False),
}
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}  # fmt: skip


def config_of(name: str, vocab_size: int = 320) -> Any:
    from transformers import AutoConfig

    kind, rope, more, _ = CASES[name]
    values = {key: v for key, v in SHAPE.items() if key in AutoConfig.for_model(kind).to_dict()}
    ropes = {"rope_parameters": json.loads(json.dumps(rope))} if rope else {}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return AutoConfig.for_model(kind, vocab_size=vocab_size, **values, **ropes, **{**ids, **more})


def saved(directory: Path, name: str, tokenizer: str) -> Path:
    """A random model, read as a base and saved as training saves it: with added tokens, and three ends."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, GenerationConfig

    base = write_tokenizer(tokenizer, directory / "base")
    file = Tokenizer.from_file(str(base / "tokenizer.json"))
    size, end = file.get_vocab_size(), json.loads((base / "tokenizer_config.json").read_text())["eos_token"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, size), dtype=torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1 or "norm" not in key:
                weight.copy_(torch.randn_like(weight) * 0.15)
    model.generation_config = GenerationConfig(eos_token_id=[5, file.token_to_id(end)])
    model.save_pretrained(base)
    loaded = checkpoint.load_assistant(str(base), format="sftflow")
    where, stored = directory / "sft", torch.bfloat16 if name == "mistral" else torch.float32
    checkpoint.save(where, loaded.model, loaded.tokenizer, loaded.renderer, dtype=stored, meta={})
    return where


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_are_one_model(name: str) -> None:
    from transformers import AutoConfig

    config = config_of(name)
    plain = json.loads(config.to_json_string())
    both = spell_config(plain)
    assert {key: both[key] for key in plain} == plain  # nothing is taken away
    again = AutoConfig.for_model(**json.loads(json.dumps(both)))
    ropes = [dict(getattr(c, "rope_parameters", None) or {}) for c in (again, config)]
    for rope in ropes:
        rope.pop("type", None)  # an older name of rope_type
    assert ropes[0] == ropes[1]
    assert config_of(name).to_dict().keys() <= again.to_dict().keys()


def test_the_keys_that_transformers_4_reads() -> None:
    rope = {"rope_theta": 70000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    wanted: dict[str, dict[str, Any]] = {
        "llama": {"rope_theta": 1234567.0, "rope_scaling": None},
        "llama linear": rope,
        "llama longrope": {"rope_theta": 10000.0, "original_max_position_embeddings": 32},
        "gemma3": {**rope, "rope_local_base_freq": 20000.0},
        "gpt_neox": {"rotary_emb_base": 70000.0, "rotary_pct": 0.5, "rope_scaling": rope["rope_scaling"]},
        "gpt_neox_japanese": {"rotary_emb_base": 70000.0, "rotary_pct": 0.5, "rope_scaling": rope["rope_scaling"]},
        "modernbert": {"global_rope_theta": 1234567.0, "local_rope_theta": 1234567.0},
        "phi": {"partial_rotary_factor": 0.5, "rope_theta": 70000.0},
        "phi3 longrope": {"rope_scaling": {"type": "longrope"} | {k: LONG[k] for k in ("short_factor", "long_factor")}},
        "olmo2 linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "qwen3_moe": {"num_experts": 4, "num_local_experts": 4},
    }
    for name, keys in wanted.items():
        both = spell_config(json.loads(config_of(name).to_json_string()) | {"dtype": "bfloat16"})
        assert {key: both[key] for key in keys} == keys, name
        assert both["torch_dtype"] == both["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["llama llama3 tied", "gemma3"])
def test_a_saved_checkpoint_has_them(tmp_path: Path, name: str) -> None:
    config = json.loads((saved(tmp_path, name, "qwen3") / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    assert config["rope_theta"] == rope["rope_theta"] and config["rope_scaling"]["factor"] == rope["factor"]
    assert config["torch_dtype"] == config["dtype"] == "float32"


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds transformers 4.57, installed apart; torch is ours."""
    folder = tmp_path_factory.mktemp("transformers-4")
    needs = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2", "requests", "urllib3", "idna",
             "certifi", "charset-normalizer"]  # fmt: skip
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]
    done = subprocess.run([*pip, str(folder), *needs], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57.6 cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


def read_by(environment: dict[str, str], out: Path, places: list[Path]) -> dict[str, Any]:
    program = [sys.executable, "-P", older_reader.__file__, str(out), *map(str, places)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_transformers_4_reads_the_same(tmp_path: Path, transformers_4: dict[str, str]) -> None:
    kinds = list(KINDS)
    places = {}
    for number, name in enumerate(CASES):  # transformers 5 reads every qwen2 with Qwen's own split, whatever is written
        kind = "qwen3" if name.startswith("qwen2") else kinds[number % len(kinds)]
        places[name] = saved(tmp_path / str(number), name, kind)
    new = read_by({**os.environ, "HF_HUB_OFFLINE": "1"}, tmp_path / "5.json", list(places.values()))
    old = read_by(transformers_4, tmp_path / "4.json", list(places.values()))
    assert old["version"] == "4.57.6" and new["version"].startswith("5.")
    for name, place in places.items():
        here, there = new[str(place)], old[str(place)]
        logits, others = (torch.tensor(read["logits"]) for read in (here, there))
        assert (logits - others).abs().max() < 1e-4 * logits.abs().max(), name
        ours = checkpoint.load_assistant(str(place))
        assert ours.model(torch.tensor([older_reader.IDS])).logits[0].sub(logits).abs().max() < 1e-4, name
        assert [ours.tokenizer(text).input_ids for text in older_reader.TEXTS] == here["ids"], name
        for key in ("ids", "decoded", "template", "special", "inputs", "ends"):
            assert here[key] == there[key], (name, key)
        assert len({5, *there["ends"]}) == 3, name  # the base's two, and that of the format


@pytest.mark.slow
@pytest.mark.skipif(not llamacpp.available(), reason="llama.cpp: pip install xllamacpp")
@pytest.mark.parametrize("name", [name for name, (*_, exported) in CASES.items() if exported])
def test_llama_cpp_computes_the_same(tmp_path: Path, name: str) -> None:
    place = saved(tmp_path, name, "smollm2")
    found = export_gguf(str(place), tmp_path / "m.gguf", "f32", prompts=8, say=lambda _: None)
    # A random model's first token may end in the middle of a character, of which llama.cpp tells no logits.
    failures = [f for f in found["failures"] if "told no log-probabilities" not in f["detail"]]
    assert not failures and found["logit_places"] and found["ids_equal"] == found["greedy_equal"] == 8, failures
