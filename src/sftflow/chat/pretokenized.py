"""Rows that are tokens already: `input_ids`, and which of them are taught.

{"input_ids": [1, 5, 8], "mask": [0, 0, 1]}            1 or true: taught
{"input_ids": [1, 5, 8], "labels": [-100, -100, 8]}    as PyTorch's loss has them: -100 is not taught; not shifted
{"input_ids": [1, 5, 8], "weights": [0, 0, 0.5]}       what the loss of each token is multiplied by
{"input_ids": [1, 5, 8]}                               where `supervise: all` teaches all of it
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from sftflow.chat.row_keys import CONVERSATIONS, IDS, LENGTHS, MASKS, TOKEN_KEYS, TOKEN_WEIGHTS, absent
from sftflow.foundation.errors import SchemaError
from sftflow.foundation.json_values import kind_of

IGNORE_INDEX = -100
"""torch.nn.CrossEntropyLoss leaves such labels out"""
_OTHERS = (*CONVERSATIONS, "prompt", "completion", "instruction", "query")


@dataclass(frozen=True, slots=True)
class Pretokenized:
    """ids: (n,) token ids.   mask: (n,) 1 where taught; None where the row does not say.   weights: (n,) what the loss
    of each is multiplied by, 0 where it is not taught; None where that is the mask."""

    ids: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None


def read_pretokenized(row: dict[str, Any], place: str) -> Pretokenized:
    """The tokens of a row with `input_ids`. Raises SchemaError where they are none, or what is taught is not said in
    one way."""
    beside = [key for key in _OTHERS if not absent(row.get(key))]
    if beside:
        fact = f"{beside[0]} beside {IDS}: both say what the row is"
        raise SchemaError(f"{place}.{IDS}", fact, "keep one of them")
    ids = _numbers(row, IDS, place)
    given = {key: _numbers(row, key, place) for key in TOKEN_KEYS if not absent(row.get(key))}
    for key, values in given.items():
        if len(values) != len(ids):
            fact = f"{len(values):,} values for {len(ids):,} {IDS}"
            raise SchemaError(f"{place}.{key}", fact, "give one for each")
    other = next((i for i, seen in enumerate(given.get("attention_mask", ())) if seen != 1), None)
    if other is not None:
        fact = f"it is {given['attention_mask'][other]}: padding, or another conversation"
        remedy = f"cut such tokens off {IDS}, and of what stands beside it"
        raise SchemaError(f"{place}.attention_mask[{other}]", fact, remedy)
    for key, one in (("position_ids", (*range(len(ids)),)), (LENGTHS, (len(ids),))):
        if not absent(row.get(key)) and _numbers(row, key, place) != one:
            fact = f"it is not that of one conversation of {len(ids):,} tokens: several are packed, or it is padded"
            raise SchemaError(f"{place}.{key}", fact, "give each conversation as a row; packing is done here")
    masks: dict[str, tuple[int, ...]] = {}
    for key in (key for key in given if key in MASKS or key in TOKEN_WEIGHTS):
        weighs = key in TOKEN_WEIGHTS
        if bad := next((value for value in given[key] if not (0 <= value <= 1 if weighs else value in (0, 1))), None):
            remedy = "write numbers from 0 to 1" if weighs else "write 1 where taught, else 0"
            raise SchemaError(f"{place}.{key}", f"it holds {bad}", remedy)
        masks[key] = tuple(int(value > 0) for value in given[key])
    weights = [given[key] for key in TOKEN_WEIGHTS if key in given and given[key][1:] != masks[key][1:]]
    if "labels" in given:
        masks["labels"] = tuple(int(label != IGNORE_INDEX) for label in given["labels"])
        wrong = [i for i, label in enumerate(given["labels"]) if label not in (IGNORE_INDEX, ids[i])]
        if wrong:
            fact = f"{given['labels'][wrong[0]]} where {IDS} has {ids[wrong[0]]}"
            remedy = f"write there the id itself, not the next one's, or {IGNORE_INDEX} where it is not taught"
            raise SchemaError(f"{place}.labels[{wrong[0]}]", fact, remedy)
    if len({mask[1:] for mask in masks.values()}) > 1 or len({each[1:] for each in weights}) > 1:
        raise SchemaError(place, f"{' and '.join(masks)} differ", "keep one of them")
    for key, mask in masks.items():
        if not any(mask[1:]):
            none = "only the first token is taught, which nothing predicts" if mask[0] else "no token is taught"
            raise SchemaError(f"{place}.{key}", f"nothing to learn: {none}", "correct it, or remove the row")
    return Pretokenized(ids, next(iter(masks.values()), None), (0, *weights[0][1:]) if weights else None)


def _numbers(row: dict[str, Any], key: str, place: str) -> tuple[Any, ...]:
    """Integers; of TOKEN_WEIGHTS also other numbers."""
    values = row[key].tolist() if hasattr(row[key], "tolist") else row[key]  # of numpy, or torch
    if not isinstance(values, list | tuple):
        raise SchemaError(f"{place}.{key}", f"it is {kind_of(values)}", "make it a list of integers")
    if not values:
        raise SchemaError(f"{place}.{key}", "it is empty", "give the row's tokens, or remove it")
    weighs = key in TOKEN_WEIGHTS
    for number, value in enumerate(values):
        if weighs and isinstance(value, float):
            continue
        if not isinstance(value, Integral) or (isinstance(value, bool) and key not in (*MASKS, "attention_mask")):
            raise SchemaError(f"{place}.{key}[{number}]", f"it is {kind_of(value)}", "make it an integer")
        if abs(int(value)) >= 1 << 31:
            raise SchemaError(f"{place}.{key}[{number}]", "a number of more than 32 bits", "write a token's id")
    return tuple(float(value) if isinstance(value, float) else int(value) for value in values)
