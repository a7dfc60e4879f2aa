"""picollm's and nanochat's weights: a model_*.pt as a transformers model in fp32, and back.

Which version of the architecture wrote a checkpoint is told by its tensors:

    smear and backout                       today's, since 14 March 2026     theta 1e5, q and k times 1.2, gates to 3
    gates that read 12 channels, no smear   of 9 March 2026                  theta 1e5, q and k times 1.15, gates to 3
    gates that read 32 channels             of January and February 2026     theta 1e4, gates to 2
    lambdas, no value embeddings            of 11 January 2026               theta 1e4
    none of these                           of 2025                         theta 1e4: transformers' NanoChatForCausalLM
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sftflow.foundation.errors import CheckpointError
from sftflow.nanochat.files import COPY_AGAIN, Files, state_of

ROWS = 64
"""rows of the tables come in multiples of this; those beyond the vocabulary stand for no token, and are not kept"""
_FLOATS = ("float32", "bfloat16", "float16")
_TABLES = ("transformer.wte.weight", "lm_head.weight")
_SHAPE = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


class Version(NamedTuple):
    """What a version's code has as constants. short: the tokens that a short layer looks back, of `sequence_len`."""

    theta: float
    qk_scale: float
    gate_range: float
    gate_channels: int
    short: Callable[[int], int]


TODAY = Version(1e5, 1.2, 3.0, 12, lambda n: -(-n // (4 * 128)) * 128)
MARCH = Version(1e5, 1.15, 3.0, 12, lambda n: -(-n // (3 * 128)) * 128)
JANUARY = Version(1e4, 1.0, 2.0, 32, lambda n: n // 2)


def model_of(files: Files) -> Any:
    """The checkpoint's model: transformers' PreTrainedModel, in fp32 on the CPU, in evaluation mode.

    Raises CheckpointError where the weights are damaged, are not tensors only, or are not those that its meta file asks
    for: tensors are named that are missing, unknown or of another shape.
    """
    import torch

    state = state_of(files)
    config = config_of(files.meta, state, files.name)
    state = _with_neutral(state, config)
    names, kind = names_of(config), _class_of(config)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in kind(config).named_parameters()}
    _require(state, {key: shapes[name] for key, name in names.items()}, config.vocab_size, files)
    ours = {}
    for key, name in names.items():
        weight = state.pop(key)
        weight = weight[: config.vocab_size] if _is_table(key) else weight.view(shapes[name])
        ours[name] = weight.to(torch.float32, copy=True)
    return kind.from_pretrained(None, config=config, state_dict=ours, dtype=torch.float32)


def config_of(meta: dict[str, Any], state: dict[str, Any], name: str = "model_config") -> Any:
    """The transformers config of a checkpoint.

    meta: what its meta_*.json says.   state: its tensors, of which names and shapes tell the version (see above).
    Raises CheckpointError, under `name`, where the shape is none, or the version cannot be told.
    """
    shape = _shape(meta["model_config"], name)
    n, length, pattern = shape["n_layer"], shape["sequence_len"], shape["window_pattern"]
    common = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["n_embd"],
        "intermediate_size": 4 * shape["n_embd"],
        "num_hidden_layers": n,
        "num_attention_heads": shape["n_head"],
        "num_key_value_heads": shape["n_kv_head"],
        "max_position_embeddings": length,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    _require_size(state, n, shape["n_embd"], name)
    smear = not state.keys().isdisjoint(("smear_gate.weight", "smear_lambda", "backout_lambda"))
    gates = {int(weight.shape[-1]) for key, weight in state.items() if key.endswith(".attn.ve_gate.weight")}
    valued = bool(gates) or any(key.startswith("value_embeds.") for key in state)
    if not (smear or valued or "resid_lambdas" in state or "x0_lambdas" in state or "S" in pattern):
        from transformers import NanoChatConfig

        from sftflow.nanochat.config import EPS

        rope = {"rope_type": "default", "rope_theta": JANUARY.theta}
        filled = {"table_rows": ROWS} if any(len(state.get(key, ())) > common["vocab_size"] for key in _TABLES) else {}
        return NanoChatConfig(**common, **filled, rope_parameters=rope, rms_norm_eps=EPS, final_logit_softcapping=15.0)
    from sftflow.nanochat.config import SftflowNanochatConfig

    version = TODAY if smear else JANUARY if gates == {JANUARY.gate_channels} or not valued else MARCH
    softcap = meta.get("softcap", None if valued and version is JANUARY else 15.0)
    if isinstance(softcap, bool) or not isinstance(softcap, int | float) or not softcap > 0:
        fact = "its version capped logits at 15 until 2 March 2026, at 20 after that, and nothing in it says which"
        if "softcap" in meta:
            fact = f"softcap is {softcap!r} in its meta file"
        raise CheckpointError(name, fact, 'write "softcap": 15 or 20 into its meta_*.json, beside model_config')
    return SftflowNanochatConfig(
        **common,
        window_pattern=pattern,
        sliding_window=version.short(length) + 1,
        # The first versions had no windows, of any length.
        long_window=length + 1 if smear or valued or "window_pattern" in meta["model_config"] else None,
        rope_parameters={"rope_type": "default", "rope_theta": version.theta},
        qk_scale=version.qk_scale,
        value_layers=None if valued or smear else [],  # the smear came after them
        value_gate_channels=version.gate_channels,
        value_gate_range=version.gate_range,
        smear_channels=24 if smear else 0,
        backout_layer=n // 2 if smear else None,
        final_logit_softcapping=float(softcap),
    )


def _require_size(state: dict[str, Any], layers: int, width: int, name: str) -> None:
    """Raises CheckpointError where a meta file asks for more than there is: before a model of that size is laid out."""
    there = {key.split(".")[2] for key in state if key.startswith("transformer.h.")}
    if layers > max((int(i) + 1 for i in there if i.isdecimal()), default=layers):
        fact = f"it has tensors of {len(there)} layers, where its meta file asks for {layers}"
        raise CheckpointError(name, fact, f"{COPY_AGAIN}, with the meta file of this model")
    table = state.get(_TABLES[0])
    if table is not None and tuple(table.shape[1:]) != (width,):
        fact = f"{_TABLES[0]} is {_by(table.shape)}, where its meta file asks for a width of {width}"
        raise CheckpointError(name, fact, f"{COPY_AGAIN}, with the meta file of this model")


def _shape(said: dict[str, Any], name: str) -> dict[str, Any]:
    """`model_config`, with what older versions left out. Raises CheckpointError where no model has that shape."""
    place = f"{name}: model_config"
    shape = {"window_pattern": "L", **said}
    for key in _SHAPE:
        if not isinstance(shape.get(key), int) or isinstance(shape[key], bool) or shape[key] < 1:
            raise CheckpointError(place, f"{key} is {shape.get(key)!r}", "copy the meta file of this model again")
    if unknown := sorted(shape.keys() - {*_SHAPE, "window_pattern"}):
        fact = f"it asks for {', '.join(unknown)}, which no version known here has"
        raise CheckpointError(place, fact, "give a checkpoint of picollm, or of nanochat up to July 2026")
    pattern = shape["window_pattern"] = str(shape["window_pattern"]).upper()
    if not pattern or set(pattern) - {"S", "L"}:
        raise CheckpointError(place, f"window_pattern is {said['window_pattern']!r}", "it is made of S and L")
    width, heads, kv_heads = shape["n_embd"], shape["n_head"], shape["n_kv_head"]
    if width % heads or heads % kv_heads or (width // heads) % 2:
        fact = f"{heads} heads of {kv_heads} keys do not fit a width of {width}"
        raise CheckpointError(place, fact, "copy the meta file of this model again")
    return shape


def meta_of(config: Any) -> dict[str, Any]:
    """`model_config` as the meta file has it, of a config that `config_of` gave (its vocabulary may have grown)."""
    shape = {
        "sequence_len": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_kv_head": config.num_key_value_heads,
        "n_embd": config.hidden_size,
    }
    windows = getattr(config, "long_window", None) is not None
    return {**shape, "window_pattern": config.window_pattern} if windows else shape


def state_dict_of(model: Any) -> dict[str, Any]:
    """The model's tensors under the names and in the shapes of model_*.pt, tables filled up with rows of zeros.

    model: of `model_of`, or what training has made of it.
    """
    import torch

    weights = dict(model.named_parameters())
    ours = hasattr(model.config, "window_pattern")
    multiple = ROWS if ours else getattr(model.config, "table_rows", 1)  # since December 2025
    out = {}
    for key, name in names_of(model.config).items():
        weight = weights[name].detach()
        if _is_table(key):
            weight = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % multiple))
        out[key] = weight[None] if key == "smear_gate.weight" else weight
    return out


def names_of(config: Any) -> dict[str, str]:
    """By the name that a tensor has in model_*.pt, the parameter that it is here."""
    out = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for i in range(config.num_hidden_layers):
        block, layer = f"transformer.h.{i}", f"model.layers.{i}"
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("proj", "o")):
            out[f"{block}.attn.c_{theirs}.weight"] = f"{layer}.self_attn.{ours}_proj.weight"
        out[f"{block}.mlp.c_fc.weight"] = f"{layer}.mlp.fc1.weight"
        out[f"{block}.mlp.c_proj.weight"] = f"{layer}.mlp.fc2.weight"
        if i in getattr(config, "value_layers", ()):
            out[f"{block}.attn.ve_gate.weight"] = f"{layer}.self_attn.value_gate"
            out[f"value_embeds.{i}.weight"] = f"{layer}.self_attn.value_embed.weight"
    if hasattr(config, "window_pattern"):
        out |= {key: f"model.{key}" for key in ("resid_lambdas", "x0_lambdas")}
    if getattr(config, "smear_channels", 0):
        out |= {"smear_gate.weight": "model.smear_gate", "smear_lambda": "model.smear_lambda"}
        out |= {"backout_lambda": "model.backout_lambda"}
    return out


def _class_of(config: Any) -> Any:
    if hasattr(config, "window_pattern"):
        from sftflow.nanochat.model import SftflowNanochatForCausalLM

        return SftflowNanochatForCausalLM
    from transformers import NanoChatForCausalLM

    return NanoChatForCausalLM


def _is_table(key: str) -> bool:
    return key in _TABLES or key.startswith("value_embeds.")


def _with_neutral(state: dict[str, Any], config: Any) -> dict[str, Any]:
    """The tensors, with those that older versions did not have, at the values at which they do nothing."""
    import torch

    if not hasattr(config, "window_pattern"):
        return state
    n = config.num_hidden_layers
    return {"resid_lambdas": torch.ones(n), "x0_lambdas": torch.zeros(n), **state}


def _require(state: dict[str, Any], wanted: dict[str, tuple[int, ...]], vocabulary: int, files: Files) -> None:
    """Raises CheckpointError naming what is missing, is unknown, or has another shape."""
    if missing := sorted(wanted.keys() - state.keys()):
        fact = f"{len(missing)} of its {len(wanted)} tensors are missing: {_some(missing)}"
        raise CheckpointError(files.name, fact, COPY_AGAIN)
    if unknown := sorted(state.keys() - wanted.keys()):
        fact = f"no known version of this layout has {_some(unknown)}"
        remedy = "give a checkpoint of picollm, or of nanochat up to July 2026, with its own meta file"
        raise CheckpointError(files.name, fact, remedy)
    filled = vocabulary + -vocabulary % ROWS
    for key, shape in wanted.items():
        kind = str(state[key].dtype).removeprefix("torch.")
        if kind not in _FLOATS:
            raise CheckpointError(files.name, f"{key} is stored as {kind}", "give the checkpoint in fp32 or bf16")
        there = tuple(state[key].shape)
        expected = (1, *shape) if key == "smear_gate.weight" else shape
        fits = there[:1] in ((vocabulary,), (filled,)) and there[1:] == expected[1:] if _is_table(key) else None
        if not (there == expected if fits is None else fits):
            asked = (filled, *expected[1:]) if _is_table(key) else expected
            fact = f"{key} is {_by(there)}, where its meta file asks for {_by(asked)}"
            raise CheckpointError(files.name, fact, f"{COPY_AGAIN}, with the meta file of this model")


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
