"""Weights that are put together in loading: experts from their parts, 8-bit floats from numbers and scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.architectures import SMALL
from sftflow.checkpoint import load_model, prepare, resolve, save
from sftflow.checkpoint.weights import load_weights
from sftflow.foundation.errors import CheckpointError

State = dict[str, torch.Tensor]
ONE = "experts.1.w1.weight"
EXPERTS = "model.layers.1.block_sparse_moe."


def rewrite(directory: Path, change: Callable[[State], State]) -> None:
    path = directory / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def configure(directory: Path, **keys: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


WRONG: dict[str, tuple[Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None], str]] = {
    "a part is missing": (lambda k, v: None if k == EXPERTS + ONE else (k, v), f"{ONE} is missing"),
    "an expert is missing": (
        lambda k, v: None if ".experts.1." in k else (k, v),
        r"experts\.1\.w\d\.weight is missing",
    ),
    "the last is missing": (lambda k, v: None if ".experts.3." in k else (k, v), "is 3x"),
    "another number": (lambda k, v: (k.replace("experts.1.", "experts.7."), v), r"experts\.1\.w\d\.weight is missing"),
    "one kind is missing": (lambda k, v: None if ".w1." in k else (k, v), "do not fit together"),
    "another shape": (lambda k, v: (k, v[1:] if k == EXPERTS + ONE else v), "do not fit together"),
    "integers": (lambda k, v: (k, v.to(torch.int8) if k == EXPERTS + ONE else v), f"{ONE} is stored as integers"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_experts_are_all_there(mixtral: Path, kind: str) -> None:
    change, words = WRONG[kind]
    rewrite(mixtral, lambda state: dict(new for k, v in state.items() if (new := change(k, v))))
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(resolve(str(mixtral)))
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{mixtral}: ")


def test_layers_that_predict_further_ahead_are_left_unread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranks = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = {**SMALL, **ranks, **experts, "num_key_value_heads": 4, "moe_intermediate_size": 16}
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, first_k_dense_replace=1))
    model.save_pretrained(tmp_path)
    behind = SMALL["num_hidden_layers"]
    ahead = {
        f"model.layers.{behind}.eh_proj.weight": torch.ones(4, 8),
        f"model.layers.{behind}.enorm.weight": torch.ones(4),
    }
    rewrite(tmp_path, lambda state: state | ahead)
    configure(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match="no place for 2 of its tensors"):
        load_weights(tmp_path, "base")
    configure(tmp_path, num_nextn_predict_layers=1)
    loaded = load_weights(tmp_path, "base").state_dict()
    assert all(torch.equal(loaded[key], weight) for key, weight in model.state_dict().items())
    said = [r.getMessage() for r in caplog.records if r.name == "sftflow.checkpoint"]
    assert said == ["note: base: its layers that predict further ahead are not read"]


@pytest.fixture
def eight_bits(tmp_path: Path, tokenizer_dir: Path) -> tuple[Path, State]:
    """A Llama whose layers are 8-bit floats with a scale for each block of 16 x 16, and its weights."""
    directory = tmp_path / "base"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")

    def quantise(state: State) -> State:
        stored = dict(state)
        for key, weight in state.items():
            if weight.ndim == 2 and ".layers." in key:
                blocks = weight.view(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
                scale = blocks.abs().amax((1, 3)) / 448
                stored[key] = (blocks / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
                stored[key + "_scale_inv"] = scale
        return stored

    rewrite(directory, quantise)
    way = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    configure(directory, quantization_config=way)
    return directory, weights


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers keeps 8-bit floats on a GPU that knows them")
def test_eight_bit_floats_are_read_with_their_scales_and_saved_as_what_they_are(
    eight_bits: tuple[Path, State], tmp_path: Path
) -> None:
    base, weights = eight_bits
    model, tokenizer, renderer, _ = prepare(resolve(str(base)))
    read = {key: weight.clone() for key, weight in model.state_dict().items()}
    for key, weight in weights.items():
        assert torch.allclose(read[key][: len(weight)], weight, atol=0.04 * float(weight.abs().max())), key
    save(tmp_path / "saved", model, tokenizer, renderer, dtype=torch.float32, meta={})
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == weights.keys()
    again = load_model(resolve(str(tmp_path / "saved")))[0].state_dict()
    assert all(torch.equal(again[key], weight) for key, weight in read.items())


def test_a_scale_that_is_missing(eight_bits: tuple[Path, State]) -> None:
    base, _ = eight_bits
    one = "model.layers.1.mlp.up_proj.weight"
    rewrite(base, lambda state: {k: v for k, v in state.items() if k != f"{one}_scale_inv"})
    with pytest.raises(CheckpointError, match=f"{one} is stored as F8_E4M3, and its scale is missing"):
        load_model(resolve(str(base)))
