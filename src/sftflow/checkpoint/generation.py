"""What a checkpoint's files say of generation: the tokens that end a reply, and how the next one is drawn."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftflow.foundation.errors import CheckpointError

FILE = "generation_config.json"
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
SAMPLED = {**GREEDY, "temperature": 1.0, "top_k": 50}
"""what transformers' `generate` takes where the checkpoint asks for sampling and says no more"""
_NESTED = ("decoder", "generator", "text_config")  # where transformers looks next


def read_ends(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids at which transformers' `generate` ends a reply: `eos_token_id` (one, or a list) of generation_config.json;
    where there is no such file, of config.json or the text model's part of it.

    Ids that the tokenizer does not have end nothing, and are left out. So is one that nobody chose: the default of a
    config class (2 for Llama) that is an ordinary word of this tokenizer.

    Raises CheckpointError where it is no list of ids.
    """
    config = _read(directory / "config.json")
    where = FILE if (directory / FILE).is_file() else "config.json"
    found = _read(directory / FILE).get("eos_token_id") if where == FILE else _from_config(config)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int for i in ids):
        fact = f"eos_token_id is {json.dumps(found)[:80]}, not a token id"
        raise CheckpointError(
            f"{directory / where}",
            fact,
            "write a whole number, the id of the token that ends a reply, or a list of them",
        )
    known = [i for i in dict.fromkeys(ids) if 0 <= i < len(tokenizer)]
    if type(found) is int and known and found not in tokenizer.added_tokens_decoder:
        known = [] if found == _default_of(config.get("model_type")) else known
    return tuple(known)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(str(path), f"not JSON ({error})", "mend it, or copy it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "not a JSON object", "mend it, or copy it again")
    return value


def _from_config(config: dict[str, Any]) -> Any:
    parts = [config, *(part for name in _NESTED if isinstance(part := config.get(name), dict))]
    return next((part["eos_token_id"] for part in parts[:2] if part.get("eos_token_id") is not None), None)


def _default_of(model_type: Any) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(model_type).get_text_config().eos_token_id
    except (ValueError, AttributeError):  # no such model type, or one without ends
        return None


def sampling_of(config: Any, place: str = FILE) -> dict[str, Any]:
    """How a transformers GenerationConfig asks for tokens to be drawn, with the keys of GREEDY, as `generate` reads it:
    without do_sample it is greedy, and only the penalty counts; what is left out has transformers' own value.

    Raises CheckpointError where a value is no number by which one can draw."""
    drawn = bool(getattr(config, "do_sample", False))
    own = {key: getattr(config, key, None) for key in (GREEDY if drawn else ("repetition_penalty",))}
    for key, value in own.items():
        if value is not None and not _can_be(key, value):
            least = "above 0" if key == "repetition_penalty" else "from 0 on"
            raise CheckpointError(place, f"{key} is {value!r:.80}", f"write a number {least}, or leave it out")
    given = {key: type(GREEDY[key])(value) for key, value in own.items() if value is not None}
    return {**(SAMPLED if drawn else GREEDY), **given}


def _can_be(key: str, value: Any) -> bool:
    if type(value) not in (int, float) or not math.isfinite(value):
        return False
    return key == "top_k" or value > 0 or (value == 0 and key != "repetition_penalty")  # (top_k of -1 is "off", too)


_LEFT_OUT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens", "epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("num_beams", "typical_p", "guidance_scale"), (1,)),
    **dict.fromkeys(
        ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings", "sequence_bias"), ([],)
    ),
    **dict.fromkeys(("exponential_decay_length_penalty", "penalty_alpha", "top_h", "dola_layers"), ()),
}


def left_out(config: Any) -> list[str]:
    """What a GenerationConfig asks for that changes replies in transformers' `generate`, and is not done here."""
    asked = {key: getattr(config, key, None) for key in _LEFT_OUT}
    return [key for key, value in asked.items() if value is not None and value not in _LEFT_OUT[key]]


def write_generation(directory: Path, config: Any, ends: Sequence[int]) -> None:
    """Write generation_config.json with these ends, where there are any. All else stays as it came: also values for
    sampling beside a do_sample that is not set, which transformers' own way of saving refuses and others obey."""
    written = copy.deepcopy(config)
    if ends:
        written.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    written.to_json_file(directory / FILE, use_diff=True, keys_to_pop=["compile_config"])
