"""Fingerprints: short hashes by which what is stored is known to be still that of the same inputs.

    stored under                          fingerprint                  depends on
    sftflow.json `fingerprint`            format_fingerprint           tokenizer, template, its arguments and clock
    $SFTFLOW_CACHE/rows/KEY               data.row_cache.cache_key     the source's files and its entry in the recipe,
      (rendered rows, also KEY.proven, KEY.I-of-N)                     tokenizer, template, RENDERED_ROWS
    eval/*.jsonl `rests_on`               hash_json of provenance_of   weights, tokenizer, template, decoding, device,
      (graded rows)                                                    GRADED_ROWS
    ... `prompt_sha256, item_sha256`      prompt_hash, items_hash      the prompt's ids; question and answer
    resume/*/state.json, DONE             training.identity            recipe, base, tokenizer, template, rows
    ledger.json `data_sha256`             data_digest                  ids, and which rows are trained on

RENDERED_ROWS and GRADED_ROWS list the code and the libraries; what draws or serves is in neither.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftflow.chat.format import ChatFormat, tokenizer_json
from sftflow.foundation.atomic_io import digest_of, sha256_file

if TYPE_CHECKING:
    import torch


PACKAGE = Path(__file__).parent
CODE_SUFFIXES = (".py", ".jinja", ".json", ".jsonl", ".txt")


# ---- code: what rows are made by


@dataclass(frozen=True, kw_only=True)
class MadeBy:
    """code: the package's modules and folders (with the data in them) that decide what comes out.
    libraries: installed packages whose version does."""

    code: tuple[str, ...]
    libraries: tuple[str, ...]

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self.libraries}


RENDERED_ROWS = MadeBy(
    code=(
        "chat",  # conversation -> ids and mask
        "data/parts.py",
        "data/prepare.py",
        "data/render_pool.py",
        "data/sources.py",
        "data/store.py",
        "data/truncate.py",
        "foundation/calculator.py",  # the results in arithmetic conversations
        "foundation/json_values.py",
        "foundation/sequences.py",
        "packing/pack.py",
        "tasks",  # conversations of the built-in tasks, and the word lists and texts they are made of
    ),
    libraries=("sftflow", "tokenizers", "jinja2"),
)
GRADED_ROWS = MadeBy(
    code=(
        "chat",  # item -> prompt
        "evaluation/grading.py",
        "evaluation/journal.py",
        "evaluation/options.py",
        "evaluation/prompts_for.py",
        "evaluation/shots.py",
        "evaluation/side_by_side.py",
        "foundation/calculator.py",  # the results that replies are continued with
        "foundation/rounding.py",
        "foundation/runtime.py",  # device and precision
        "foundation/json_values.py",
        "foundation/sequences.py",
        "generation",  # prompt -> reply
        "packing",  # attention of the model
        "sandbox",  # code that a reply holds is run here
        "tasks",  # items and graders
    ),
    libraries=("sftflow", "torch", "transformers"),
)


@cache
def code_hash(made_by: MadeBy, package: Path = PACKAGE) -> str:
    """Of the listed files: their names below the package and their bytes."""
    listed = [package / name for name in made_by.code]
    files = {p for place in listed for p in (place.rglob("*") if place.is_dir() else [place])}
    paths = sorted(p for p in files if p.suffix in CODE_SUFFIXES)
    return digest_of(p.relative_to(package).as_posix().encode() + b"\0" + p.read_bytes() + b"\0" for p in paths)


# ---- chat formats and prompts


def format_fingerprint(tokenizer: Any, chat_format: ChatFormat) -> str:
    """Of everything that turns a conversation into ids."""
    words = json.dumps(tokenizer_json(tokenizer), sort_keys=True, ensure_ascii=False)
    arguments = json.dumps([chat_format.kwargs, chat_format.now], sort_keys=True)
    named = [json.dumps(chat_format.named, sort_keys=True)] if chat_format.named else []
    return digest_of(text.encode() for text in (words, chat_format.template, arguments, *named))


def prompt_hash(ids: Iterable[int]) -> str:
    return digest_of([np.asarray(list(ids), np.int64).tobytes()])


def items_hash(items: Iterable[Any]) -> str:
    """Of everything that is asked and graded."""
    asked = ([i.id, [[m.role, m.text] for m in i.messages], i.answer, i.choices] for i in items)
    return digest_of(json.dumps(item, ensure_ascii=False).encode() for item in asked)


def hash_json(value: Any) -> str:
    """Of a JSON value; the order of an object's keys does not count."""
    return digest_of([json.dumps(value, sort_keys=True).encode()])


# ---- rendered rows and runs


class StoredRows(Protocol):
    """The rendered rows of one source, on disk (`data.store.RowStore`)."""

    directory: Path
    table: NDArray[Any]
    spans: NDArray[Any]
    meta: dict[str, Any]


def row_digest(ids: NDArray[np.int32]) -> int:
    """64 bits of a row's ids: among a million rows, two differing ones meet once in 37 million mixtures."""
    data = ids.astype("<i4", copy=False).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def data_digest(sources: Iterable[StoredRows], *chosen: NDArray[np.int32]) -> str:
    """Of every row's ids, in order, of what counts in part, and of which rows are trained on and which are held out."""
    return digest_of([*map(_table_bytes, sources), *(index.tobytes() for index in chosen)])


def _table_bytes(rows: StoredRows) -> bytes:
    return bytes(rows.table["digest"].tobytes() + rows.table["supervised"].tobytes() + rows.spans.tobytes())


def rows_digest(rows: StoredRows) -> str:
    """Of every row's ids and mask, in order."""
    return digest_of([_table_bytes(rows), sha256_file(rows.directory / "mask.bin").encode()])


# ---- weights


def weights_hash(model: Any) -> str:
    """SHA-256 over every weight's name, dtype, shape and bytes: the same on every device, with any number of threads,
    wherever the files came from. Tied weights are read once."""
    return digest_of(_weight_lines(model).values())


def weights_and_body_hash(model: Any) -> tuple[str, str]:
    """`weights_hash`, and that of all but embedding, head and other tables of tokens, which a chat format's tokens make
    longer."""
    from torch.nn import Embedding

    lines, rows = _weight_lines(model), len(model.get_input_embeddings().weight)
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    tables = [m for m in model.modules() if isinstance(m, Embedding) and len(m.weight) == rows]
    theirs = {_place(weight) for end in (*ends, *tables) for weight in end.state_dict().values()}
    body = (lines[name] for name, weight in sorted(model.state_dict().items()) if _place(weight) not in theirs)
    return digest_of(lines.values()), digest_of(body)


def _weight_lines(model: Any) -> dict[str, bytes]:
    """What is hashed of each weight, by name, sorted."""
    weights: dict[str, torch.Tensor] = model.state_dict()
    own = {_place(weight): name for name, weight in reversed(weights.items())}  # the first name of each
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashlib lets other threads run
        names = sorted(own.values())
        of_bytes = dict(zip(names, pool.map(_bytes_hash, [weights[n] for n in names]), strict=True))
    return {
        name: f"{name} {weight.dtype} {tuple(weight.shape)} {of_bytes[own[_place(weight)]]}\n".encode()
        for name, weight in sorted(weights.items())
    }


def _place(weight: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    if not weight.numel():
        return (weight.dtype, tuple(weight.shape))
    return (weight.device, weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride())


def _bytes_hash(weight: torch.Tensor) -> str:
    import torch

    flat = weight.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()  # as bytes, for NumPy has no bf16
