"""Saving and restoring a run between two steps, without pickle: tensors as safetensors, the rest as JSON.

resume/step-00000200/   model.safetensors  optimizer.safetensors  state.json
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sftflow.errors import CheckpointError
from sftflow.files import sha256_file, write_directory
from sftflow.train.loop import Trainer


def _optimizer_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    out = {}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                out[f"{number}/{index}/{key}"] = torch.as_tensor(value).contiguous()
    return out


def save_state(root: Path, trainer: Trainer, identity: dict[str, str], extra: dict[str, Any], keep: int) -> Path:
    """Write `root/step-N` for the trainer's present step and drop all but the newest `keep`.

    identity: what must not change on resume (recipe, data, tokenizer and format), compared by `load_state`.
    """
    target = root / f"step-{trainer.step:08d}"

    def fill(directory: Path) -> None:
        parameters = {n: p.detach().contiguous() for n, p in trainer.model.named_parameters()}
        save_file(parameters, directory / "model.safetensors")
        tensors = _optimizer_tensors(trainer)
        tensors["rng"] = torch.get_rng_state()
        save_file(tensors, directory / "optimizer.safetensors")
        state = {
            "step": trainer.step,
            "bad_steps": trainer.bad_steps,
            "identity": identity,
            "extra": extra,
            "sha256": {p.name: sha256_file(p) for p in sorted(directory.glob("*.safetensors"))},
        }
        (directory / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")

    write_directory(target, fill)
    for old in saved_states(root)[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return target


def saved_states(root: Path) -> list[Path]:
    """Whole saved states, oldest first."""
    return sorted(p for p in root.glob("step-*") if (p / "state.json").is_file())


def load_state(directory: Path, trainer: Trainer, identity: dict[str, str]) -> dict[str, Any]:
    """Put a fresh trainer where the saved one was; returns the saved `extra`.

    Raises CheckpointError where a file is damaged or the run has changed since.
    """
    state: dict[str, Any] = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    for name, expected in state["sha256"].items():
        path = directory / name
        if not path.is_file() or sha256_file(path) != expected:
            fact = "missing" if not path.is_file() else "its sha256 is not the one recorded when it was saved"
            raise CheckpointError(str(path), fact, "remove this saved state; an older one, if kept, is used then")
    for key in sorted({*identity, *state["identity"]}):
        was, now = state["identity"].get(key), identity.get(key)
        if was != now:
            raise CheckpointError(
                str(directory), f"{key} changed since this run was saved ({was} -> {now})", "start in a new train.out"
            )
    parameters = dict(trainer.model.named_parameters())
    saved = load_file(directory / "model.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    tensors = load_file(directory / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng"))
    for number, optimizer in enumerate(trainer.optimizers):
        whole = optimizer.state_dict()
        per_parameter: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            n, index, name = key.split("/")
            if int(n) == number:
                per_parameter.setdefault(int(index), {})[name] = value
        whole["state"] = per_parameter
        optimizer.load_state_dict(whole)
    trainer.step, trainer.bad_steps = state["step"], state["bad_steps"]
    return dict(state["extra"])
