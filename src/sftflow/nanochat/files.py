"""What lies in a base directory of picollm or nanochat, and which of its checkpoints a path means.

BASE/base_checkpoints/d20/model_021400.pt      weights: a plain state dict, by the number of steps
                          meta_021400.json     their shape, under `model_config`
BASE/chatsft_checkpoints/d20/...               the same after fine-tuning; other stages are called alike
BASE/tokenizer/tokenizer.pkl                   a pickled tiktoken.Encoding (or a tokenizer.json)
               token_bytes.pt                  the bytes of each token, for bits per byte
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from sftflow.foundation.errors import CheckpointError, said_of

if TYPE_CHECKING:
    from torch import Tensor

STAGES = "*_checkpoints"
COPY_AGAIN = "copy the checkpoint again"
WRAPPER = "_orig_mod."
"""what torch.compile writes before the names of a model that is saved inside it"""
RECORD = "sftflow"
"""a key of our own in the meta file, with what says where the model comes from"""
TOKENIZERS = ("tokenizer.pkl", "tokenizer.json")
_MODEL = re.compile(r"model_(\d+)\.pt")
_DEPTH = re.compile(r"d(\d+)")


@dataclass(frozen=True)
class Files:
    """One checkpoint. model: its model_*.pt; meta: what its meta_*.json says; tokenizer: the file of the tokenizer.

    name: as the user named it.   chosen: where the name fits several, which was taken of which; else "".
    """

    model: Path
    meta: dict[str, Any]
    tokenizer: Path
    name: str
    chosen: str = ""

    @property
    def shape(self) -> dict[str, Any]:
        """`model_config` of the meta file: sequence_len, vocab_size, n_layer, n_head, n_kv_head, n_embd ..."""
        return dict(self.meta["model_config"])

    @property
    def record(self) -> dict[str, Any]:
        """What sftflow.json of another checkpoint says: written by our own export, or that it is no base any more."""
        kind = {"kind": "sft"} if self.model.parents[1].name.startswith(("mid_", "chat")) else {}
        return {"step": self.step, **kind, **(self.meta.get(RECORD) or {})}

    @property
    def step(self) -> int:
        return int(_MODEL.fullmatch(self.model.name)[1])  # type: ignore[index]  # so it was found


def files_of(path: Path, name: str | None = None) -> Files | None:
    """The checkpoint that a path means: of a base directory, a stage's folder, a model's folder, or a model_*.pt.

    Where several would do, it is the one that the projects' own loader takes: the largest model, its last step.
    None where nothing of the kind is there. Raises CheckpointError where the path does not say which of several, and
    where the meta file or the tokenizer is missing or damaged.   name: what the path is called in messages.
    """
    name = str(path) if name is None else name
    if path.is_file():
        return _read(path, name, "") if _MODEL.fullmatch(path.name) else None
    if not path.is_dir():
        return None
    folder, chosen = path, []
    folders = [stage for stage in sorted(folder.glob(STAGES)) if stage.is_dir()]
    stages = [stage for stage in folders if _models(stage)]
    if len(stages) > 1:
        fact = f"it holds {' and '.join(stage.name for stage in stages)}"
        raise CheckpointError(name, fact, f"name the one that is meant: {path / stages[0].name}")
    if folders and not stages and (path / "tokenizer").is_dir():
        fact = f"no model_*.pt in {', '.join(stage.name for stage in folders)}"
        raise CheckpointError(name, fact, "copy the weights into it, too, or name another checkpoint")
    folder = stages[0] if stages else folder
    if models := _models(folder):
        folder = _largest(models, name)
        if len(models) > 1:
            chosen.append(f"{folder.name} of {', '.join(model.name for model in models)}")
    steps = _steps(folder)
    if not steps:
        return None
    last = steps[max(steps)]
    if len(steps) > 1:
        chosen.append(f"step {max(steps)} of {', '.join(map(str, sorted(steps)))}")
    return _read(last, name, "; ".join(chosen))


def _models(stage: Path) -> list[Path]:
    """The folders of a stage that hold weights."""
    return [folder for folder in sorted(stage.iterdir()) if folder.is_dir() and _steps(folder)]


def _steps(folder: Path) -> dict[int, Path]:
    return {int(found[1]): file for file in folder.iterdir() if (found := _MODEL.fullmatch(file.name))}


def _largest(models: list[Path], name: str) -> Path:
    """The model of most layers, by its folder's name. Raises CheckpointError where that does not say."""
    depths = [int(found[1]) if (found := _DEPTH.match(model.name)) else -1 for model in models]
    best = [model for model, depth in zip(models, depths, strict=True) if depth == max(depths)]
    if len(best) > 1:
        fact = f"it holds {' and '.join(model.name for model in best)}"
        raise CheckpointError(name, fact, f"name the one that is meant: {best[0]}")
    return best[0]


def _read(model: Path, name: str, chosen: str) -> Files:
    meta = model.with_name(f"meta_{model.stem.removeprefix('model_')}.json")
    if not meta.is_file():
        fact = f"{meta.name} is missing, which says the shape of {model.name}"
        raise CheckpointError(name, fact, f"copy it into {model.parent}, too")
    try:
        said = json.loads(meta.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(str(meta), *said_of(error)) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(meta), f"not JSON ({error})", COPY_AGAIN) from None
    if not isinstance(said, dict) or not isinstance(said.get("model_config"), dict):
        raise CheckpointError(str(meta), "no model_config in it", COPY_AGAIN)
    return Files(model, said, _tokenizer(model, name), name, chosen)


def _tokenizer(model: Path, name: str) -> Path:
    """The tokenizer's file: of the base directory, or beside weights that were copied out of it."""
    beside = Path(os.path.abspath(model)).parent  # as it is named, though the folder may be a link to another disk
    for folder in (beside, beside / "tokenizer", beside.parent / "tokenizer", beside.parents[1] / "tokenizer"):
        for file in TOKENIZERS:
            if (folder / file).is_file():
                return folder / file
    fact = f"no tokenizer/tokenizer.pkl beside {beside.parent.name}"
    raise CheckpointError(name, fact, f"copy the tokenizer folder into {beside.parents[1]}, too")


def state_of(files: Files) -> dict[str, Tensor]:
    """The weights by their names, as they are stored, mapped from the file. Raises CheckpointError for what is no plain
    state dict: only tensors are unpickled."""
    import torch

    try:
        state = torch.load(files.model, map_location="cpu", mmap=is_zipfile(files.model), weights_only=True)
    except OSError as error:
        raise CheckpointError(str(files.model), *said_of(error)) from None
    except Exception as error:  # torch's, its pickle's and its archive's
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        fact = f"it asks for {asked[1]}, and only tensors are read" if asked else "damaged or cut short"
        raise CheckpointError(str(files.model), fact, COPY_AGAIN) from error
    if not isinstance(state, dict) or not all(
        isinstance(weight, torch.Tensor) and weight.layout is torch.strided for weight in state.values()
    ):
        raise CheckpointError(str(files.model), "not a plain state dict", "save model.state_dict() alone")
    plain = {str(key).removeprefix(WRAPPER): weight for key, weight in state.items()}
    if len(plain) < len(state):
        raise CheckpointError(str(files.model), f"tensors with and without {WRAPPER} before one name", "save it again")
    return plain
