"""Writing a checkpoint directory, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftflow.chat.format import ChatFormat
from sftflow.checkpoint.generation import write_generation
from sftflow.checkpoint.older_readers import respell_config
from sftflow.checkpoint.tokenizer import write_tokenizer
from sftflow.checkpoint.weights import distinct_weights, settle_head
from sftflow.fingerprint import format_fingerprint
from sftflow.foundation.atomic_io import (
    sha256_file,
    with_checksum,
    write_directory,
    write_json,
)
from sftflow.foundation.errors import CheckpointError
from sftflow.foundation.ranks import Ranks
from sftflow.foundation.rounding import round_bf16

if TYPE_CHECKING:
    from sftflow.chat.render import Renderer

ALONE = Ranks()
MOST_BYTES = 5 * 10**9
"""of one file of a model that is gathered for it"""


def stored(weight: Any, dtype: Any) -> Any:
    """The weight in the checkpoint's dtype: in bf16 as training rounds it, so that what was measured is saved."""
    import torch

    if dtype == torch.bfloat16 and weight.dtype == torch.float32:
        return round_bf16(weight)
    return weight.detach().to(dtype)


def save(
    target: Path,
    model: Any,
    tokenizer: Any,
    renderer: Renderer | None,
    *,
    dtype: Any,
    meta: dict[str, Any],
    ranks: Ranks = ALONE,
) -> None:
    """Write a checkpoint directory, whole or not at all.

    renderer: None leaves chat template and generation config as they are; `meta` may name the format.
    ranks: all come here where each has a part of the model; the first writes.

    It loads with AutoModelForCausalLM, carries the chat template, and stops by its generation_config.json where the
    renderer says that a reply ends. The weights are written in `dtype`.
    """
    from transformers import GenerationConfig

    stop = renderer.stop_ids() if renderer else []
    name_of_dtype = str(dtype).removeprefix("torch.")

    def fill(directory: Path) -> None:
        settle_head(model)
        weights = distinct_weights(model)
        shared = any(is_shared_out(weight) for weight in weights.values())
        state = {} if shared else {k: stored(v, dtype).cpu().contiguous() for k, v in weights.items()}
        old_dtype, implementation = model.config.dtype, model.config._attn_implementation
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        generation, model.generation_config = model.generation_config, GenerationConfig()
        try:
            model.save_pretrained(directory, state_dict=state)
            if shared:
                write_gathered(model, dtype, directory)
        finally:
            model.generation_config = generation
            model.config.dtype = old_dtype
            model.set_attn_implementation(implementation)
        # transformers writes the dtype in memory, whatever is stored: "auto" readers would take fp32 for bf16.
        respell_config(directory, dtype=name_of_dtype)
        write_generation(directory, generation, stop)
        _write_rest(directory, tokenizer, renderer, name_of_dtype, meta)

    if ranks.first:
        write_directory(target, fill)
    elif any(is_shared_out(parameter) for parameter in model.parameters()):
        settle_head(model)
        write_gathered(model, dtype, None)


def is_shared_out(weight: Any) -> bool:
    """Whether each rank has a part of it only."""
    return hasattr(weight, "full_tensor")


def require_own_names(model: Any) -> None:
    """Raises CheckpointError where transformers saves a model's weights under other names than it computes with: that
    takes all of them at once, and cannot be done a file at a time."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    names = {name: torch.empty(weight.shape, device="meta") for name, weight in distinct_weights(model).items()}
    if revert_weight_conversion(model, dict(names)).keys() != names.keys():
        fact = f"the weights of {type(model).__name__} are saved under other names, which takes all of them at once"
        raise CheckpointError("train.shard", fact, "set train.shard: no")


def write_gathered(model: Any, dtype: Any, directory: Path | None) -> None:
    """Write a model of which each rank has a part, a file at a time: no rank ever has more of it than one file's.

    directory: None on all ranks but the one that writes. All must come here together, with a model of which
    `require_own_names` holds.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    weights = distinct_weights(model)
    sizes = {name: torch.empty(weight.shape, dtype=dtype, device="meta") for name, weight in weights.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=MOST_BYTES)
    for file, inside in plan.filename_to_tensors.items():
        part = {}
        for name in inside:
            weight = weights[name].full_tensor() if is_shared_out(weights[name]) else weights[name]
            if directory is not None:
                part[name] = stored(weight, dtype).cpu().contiguous()
        if directory is not None:
            save_file(part, directory / file, metadata={"format": "pt"})
    if directory is not None and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)


def save_adapter(
    target: Path, wrapped: Any, tokenizer: Any, renderer: Renderer, *, dtype: Any, meta: dict[str, Any]
) -> None:
    """Write the adapter of a peft model as a directory of peft's, whole or not at all.

    dtype: what its base is stored in.   meta: `base` names it as the adapter's config does, and has its hash.
    """

    def fill(directory: Path) -> None:
        wrapped.save_pretrained(directory, save_embedding_layers=False)  # the base has these; new rows are apart
        (directory / "README.md").unlink(missing_ok=True)  # peft's model card, to be filled in
        _write_rest(directory, tokenizer, renderer, str(dtype).removeprefix("torch."), meta)

    write_directory(target, fill)


def _write_rest(directory: Path, tokenizer: Any, renderer: Renderer | None, dtype: str, meta: dict[str, Any]) -> None:
    """The tokenizer, and sftflow.json with the hash of every file."""
    write_tokenizer(tokenizer, directory)
    files = sorted(p for p in directory.iterdir() if p.is_file())
    record = {
        **meta,
        **(_format_record(tokenizer, renderer.format) if renderer else {}),
        "dtype": dtype,
        "sha256": {p.name: sha256_file(p) for p in files},
    }
    write_json(directory / "sftflow.json", with_checksum(record))


def _format_record(tokenizer: Any, chat_format: ChatFormat) -> dict[str, Any]:
    fingerprint = format_fingerprint(tokenizer, chat_format)
    return {"kind": "sft", "format": chat_format.to_json(), "fingerprint": fingerprint}
