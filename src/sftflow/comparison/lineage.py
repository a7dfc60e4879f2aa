"""What the checkpoints themselves show of how two models are related: only that may be said of a comparison.

sftflow.json of a trained checkpoint has its `base`: {"name", "body", "kind", "fingerprint", "base": of that one, ...}.
`body` is the hash of all weights but embedding and head, which a chat format's tokens may make longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sftflow.checkpoint import Assistant, resolve
from sftflow.evaluation.evaluate import weights_of
from sftflow.fingerprint import weights_and_body_hash
from sftflow.foundation.errors import SftflowError

BASE_AND_SFT = "base-versus-SFT"
CONTINUED = "continued SFT"
TURNED = "SFT-versus-base"
SIBLINGS = "two of one base"
SAME = "one model twice"
UNKNOWN = "two models"

REMARKS = {
    CONTINUED: "the starting checkpoint was already instruction-tuned: this is continued SFT, not base versus SFT",
    TURNED: "the first was trained from the second: what is gained here, training has lost",
    SIBLINGS: "both were trained from one base: what differs is between the two, no gain over where they started",
    SAME: "both are the same weights: what differs is their format, or chance",
    UNKNOWN: "nothing in the checkpoints shows that the second was trained from the first",
}


def kind_of(base: Assistant, sft: Assistant) -> str:
    """One of the kinds above."""
    if weights_of(base) == weights_of(sft):
        return SAME
    of_base, of_sft = list(_ancestors(base)), list(_ancestors(sft))
    if any(_is(record, base) for record in of_sft):
        return CONTINUED if is_tuned(base) else BASE_AND_SFT
    if any(_is(record, sft) for record in of_base):
        return TURNED
    return SIBLINGS if any(_are_one(a, b) for a in of_base for b in of_sft) else UNKNOWN


def is_tuned(model: Assistant) -> bool:
    """A base that brings a chat template of its own has been instruction-tuned before."""
    return bool(model.info.get("own_template")) or model.info.get("kind") == "sft"


def _ancestors(model: Assistant) -> Iterator[Mapping[str, Any]]:
    """The records of what a model was trained from, of what that was trained from, and so on."""
    record = model.info.get("base")
    while isinstance(record, Mapping):
        yield record
        record = record.get("base")


def _is(record: Mapping[str, Any], model: Assistant) -> bool:
    """Whether a record is of this model: by its weights; by its name where an earlier version wrote no hash of them."""
    if record.get("body"):
        if "body_hash" not in model.info:
            model.info["body_hash"] = weights_and_body_hash(model.model)[1]
        return bool(record["body"] == model.info["body_hash"])
    return _lies_at(record.get("name"), model.name)


def _are_one(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if a.get("body") and b.get("body"):
        return bool(a["body"] == b["body"])
    return _lies_at(a.get("name"), b.get("name"))


def _lies_at(one: str | None, other: str | None) -> bool:
    """Whether two names mean the same files; the hub is not asked."""
    if not one or not other or one == other:
        return bool(one) and one == other
    try:
        here = all(Path(name).expanduser().is_dir() for name in (one, other))
        return here and Path(resolve(one).path).samefile(resolve(other).path)
    except SftflowError:  # what lies there is no checkpoint any more
        return False
