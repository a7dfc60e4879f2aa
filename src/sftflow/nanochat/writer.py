"""Writing a base directory as picollm and nanochat read it; `files.py` has its picture."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from sftflow.foundation.atomic_io import write_json
from sftflow.nanochat.files import RECORD
from sftflow.nanochat.vocabulary import CLASS, MODULE, Encoding


def write_base(
    directory: Path, stage: str, state: dict[str, Any], meta: dict[str, Any], encoding: Encoding, record: dict[str, Any]
) -> None:
    """Fill a folder: the weights and their meta file as one checkpoint of a stage, and the tokenizer.

    state: the weights under their names there.   meta: its `step` and `model_config` name the files and the folder.
    record: what the checkpoint says of where it comes from, for our own reading.
    """
    import torch

    step = f"{meta['step']:06d}"
    folder = directory / stage / f"d{meta['model_config']['n_layer']}"
    folder.mkdir(parents=True)
    with (folder / f"model_{step}.pt").open("wb") as file:
        torch.save({key: weight.detach().cpu().clone() for key, weight in state.items()}, file)
    write_json(folder / f"meta_{step}.json", {**meta, "user_config": {}, RECORD: record})
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.pkl").write_bytes(pickled(encoding))
    with (tokenizer / "token_bytes.pt").open("wb") as file:
        torch.save(torch.tensor(token_bytes(encoding), dtype=torch.int32), file)


def token_bytes(encoding: Encoding) -> list[int]:
    """How many bytes of text each id stands for; 0 for special tokens, which no text is counted by."""
    sizes = dict.fromkeys(encoding.special.values(), 0) | {i: len(token) for token, i in encoding.ranks.items()}
    return [sizes[i] for i in range(len(sizes))]


def pickled(encoding: Encoding) -> bytes:
    """A pickled tiktoken.Encoding, made without tiktoken: its class by name, `__new__` without arguments, its state."""
    state = {
        "name": encoding.name,
        "pat_str": encoding.pattern,
        "mergeable_ranks": encoding.ranks,
        "special_tokens": encoding.special,
    }
    body = pickle.dumps(state, protocol=3).removeprefix(pickle.PROTO + b"\x03").removesuffix(pickle.STOP)
    made = pickle.GLOBAL + f"{MODULE}\n{CLASS}\n".encode() + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    return pickle.PROTO + b"\x03" + made + body + pickle.BUILD + pickle.STOP
