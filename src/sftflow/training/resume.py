"""Saving and restoring a run between two steps, without pickle: tensors as safetensors, the rest as JSON.

resume/step-00000200/   model.safetensors  optimizer.safetensors  state.json

What `sftflow base` or an earlier fine-tuning has left there, `warm_start` takes up for training on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sftflow.chat.files.names import files_of
from sftflow.checkpoint import resolve
from sftflow.data.sources import data_name
from sftflow.foundation.atomic_io import (
    check_hashes,
    read_record,
    remove_directory,
    require_writable,
    sha256_file,
    with_checksum,
    write_together,
)
from sftflow.foundation.errors import CheckpointError, DataError, RunError
from sftflow.foundation.ranks import Ranks
from sftflow.recipe import Recipe, load_recipe
from sftflow.training.identity import Identity, recipe_identity, told_changes
from sftflow.training.loggers import require_logger
from sftflow.training.optimizers import Muon, joined_moments, moment_parts
from sftflow.training.sharded_state import read_shards, read_small, stored_sizes, write_shards
from sftflow.training.trainer import Trainer

MOMENTS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}
"""what each torch optimizer keeps for a parameter; one that is not listed takes over no state of an earlier run"""
NO_WARM_START = "set train.warm_start: false"
DONE = "DONE"
"""the file of a finished run: {"steps", "asked": see `asked_for`, "identity"}; of earlier versions, "24 steps\""""
MEASURED_LATER = ("eval.json", "compare.json", "report.html")
RESULTS = ("checkpoint", *MEASURED_LATER)


def save_state(root: Path, trainer: Trainer, identity: Identity, extra: dict[str, Any], keep: int) -> None:
    """Write `root/step-N` for the trainer's present step and drop all but the newest `keep`.

    identity: what must not change on resume, compared by `load_state`.
    """

    here, random = trainer.ranks, _random_states(trainer)

    def fill(directory: Path) -> None:
        parameters = {n: p.detach() for n, p in _saved_parameters(trainer).items()}
        if trainer.sharded:
            write_shards(directory, trainer, parameters, random)
        elif here.first:
            save_file({n: p.contiguous() for n, p in parameters.items()}, directory / "model.safetensors")
            save_file(_optimizer_tensors(trainer) | random, directory / "optimizer.safetensors")
        hashes = {p.name: sha256_file(p) for p in _of_this_rank(directory, here)}
        hashes = {name: sha for part in here.gather(hashes) for name, sha in part.items()}
        state = {
            "step": trainer.step,
            "bad_steps": trainer.bad_steps,
            "identity": identity,
            "extra": extra,
            "sha256": hashes,
        }
        if here.first:
            (directory / "state.json").write_text(json.dumps(with_checksum(state), indent=2), encoding="utf-8")

    write_together(root / f"step-{trainer.step:08d}", fill, here)
    if here.first:
        for old in saved_states(root)[:-keep]:
            remove_directory(old)
    here.barrier()


def _of_this_rank(directory: Path, ranks: Ranks) -> list[Path]:
    """The files of a saved state that this rank has written."""
    mine = f"shard-{ranks.rank + 1:05d}-"
    every = sorted(directory.glob("*.safetensors"))
    return [p for p in every if p.name.startswith(mine) or (ranks.first and not p.name.startswith("shard-"))]


def saved_states(root: Path) -> list[Path]:
    """The saved states, oldest first. They are whole, unless somebody damaged them since."""
    return sorted(p for p in root.glob("step-*") if p.is_dir())


def require_own_links(out: Path) -> None:
    """Raises CheckpointError where `checkpoint` or `resume` is a link to a folder that holds something else: what is
    saved replaces all that is there."""
    for path in (out / "checkpoint", out / "resume"):
        if not (path.is_symlink() and path.is_dir()) or (path / "sftflow.json").is_file():
            continue
        states = ("step-", "tokenizer", ".") if path.name == "resume" else (".",)
        foreign = sorted(p.name for p in path.iterdir() if not p.name.startswith(states))
        if foreign:
            fact = f"a link to a folder with something else in it ({foreign[0]}), which would be removed"
            raise CheckpointError(str(path), fact, "let it lead to an empty folder, or remove the link")


def forget(root: Path) -> None:
    """Remove the saved states, or the checkpoint, of an earlier run: one that starts anew must not be taken for it."""
    if root.is_dir():
        remove_directory(root)


def require_free(out: Path, anew: str) -> None:
    """Raises CheckpointError where there is something in a folder that training there would destroy.

    anew: what to do for that to happen.
    """
    there = [name for name in RESULTS if (out / name).is_file() or any((out / name).glob("*"))]
    trained, states = "checkpoint" in there, saved_states(out / "resume")
    begun = (out / "ledger.json").is_file() if trained else bool(states)
    if begun and not (out / DONE).is_file():
        raise CheckpointError(str(out), "an unfinished run is in it", f"continue it with --resume, or {anew}")
    if there or (out / DONE).is_file():
        what = "a finished run is in it" if trained else "results are in it"
        raise CheckpointError(str(out), f"{what} ({', '.join(there)})", f"name another folder, or {anew}")


def require_startable(recipe: Recipe, out: Path, *, anew: bool) -> None:
    """Raises CheckpointError or RunError where a run cannot be written there. anew: nothing there may be replaced."""
    if anew:
        require_free(out, "start anew with --overwrite")
    require_logger(recipe.train.logger)
    try:
        require_writable(out / "checkpoint")
    except OSError as error:
        fact = f"cannot write ({error.strerror or error})"
        raise RunError(str(out / "checkpoint"), fact, "check the disk and its permissions") from error


def read_done(out: Path) -> dict[str, Any] | None:
    """What a finished run was: {"steps", "asked", "identity"}; None where none is finished. One of an earlier version
    is known by its recipe."""
    if not (out / DONE).is_file():
        return None
    with contextlib.suppress(ValueError):
        return dict(json.loads((out / DONE).read_text(encoding="utf-8")))
    return {"identity": recipe_identity(load_recipe(out / "recipe.yaml"))}


def missing_input(recipe: Recipe) -> str | None:
    """Which of a recipe's base, template and data is not there (any more); None where all are."""
    try:
        resolve(recipe.base)
    except CheckpointError:
        return recipe.base
    names = [data_name(entry) for entry in recipe.sources]
    for name in filter(None, [recipe.format if recipe.format.endswith(".jinja") else None, *names]):
        try:
            if not all(file.path().exists() for file in files_of(name)[:1]):
                return name
        except DataError:
            return name
    return None


def load_state(directory: Path, trainer: Trainer, identity: Identity) -> dict[str, Any]:
    """Put a fresh trainer where the saved one was; returns the saved `extra`.

    Raises CheckpointError where a file is damaged or missing, and where the run has changed since, naming all of it.
    """
    remedy = _go_on_without(directory)
    state = read_record(directory / "state.json", remedy)
    if fact := told_changes(state["identity"], identity, "the run has changed since this was saved"):
        raise CheckpointError(str(directory), fact, "undo that, or start in a new train.out")
    mine = sorted(state["sha256"])[trainer.ranks.rank :: trainer.ranks.world]
    check_hashes(directory, {name: state["sha256"][name] for name in mine}, remedy)
    trainer.ranks.barrier()
    if trainer.sharded or not (directory / "model.safetensors").is_file():
        sizes = stored_sizes(directory)
        parameters = _saved_parameters(trainer)
        _require_parameters(directory, {n: s for n, s in sizes.items() if "/" not in n and "rng" not in n}, parameters)
        read_shards(directory, trainer, dict(parameters), sizes)
        random = read_small(directory, sizes)
        trainer.refresh()
    else:
        _load_parameters(directory, trainer)
        moments, random = read_optimizers(directory)
        for number, optimizer in enumerate(trainer.optimizers):
            kept = {parameter: joined_moments(state) for (n, parameter), state in moments.items() if n == number}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})
    _restore_random(random, trainer)
    trainer.step, trainer.bad_steps = state["step"], state["bad_steps"]
    return dict(state["extra"])


Moments = dict[tuple[int, int], dict[str, torch.Tensor]]


def read_optimizers(directory: Path) -> tuple[Moments, dict[str, torch.Tensor]]:
    """({(optimizer, parameter): {name: tensor}}, {name: random state}) of a saved state."""
    moments: Moments = {}
    random = {}
    for key, value in load_file(directory / "optimizer.safetensors").items():
        if key.count("/") == 2:
            number, parameter, name = key.split("/")
            moments.setdefault((int(number), int(parameter)), {})[name] = value
        else:
            random[key] = value
    return moments, random


def _optimizer_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The optimizers' states, OPTIMIZER/PARAMETER/NAME -> tensor."""
    out: dict[str, torch.Tensor] = {}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                out |= {f"{number}/{index}/{key}{part}": x for part, x in moment_parts(value).items()}
    return out


def _random_states(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The states of every rank's random numbers: "rng" of the first, "rng.1" of the next; with "cuda_" before it, of
    its device's."""
    mine = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        mine["cuda_rng"] = torch.cuda.get_rng_state()
    states = trainer.ranks.gather(mine)
    return {_of_rank(key, rank): value for rank, each in enumerate(states) for key, value in each.items()}


def _restore_random(states: dict[str, torch.Tensor], trainer: Trainer) -> None:
    """Go on with the random numbers that this rank had; one that is new keeps its own (only dropout draws any)."""
    rank = trainer.ranks.rank
    if (state := states.get(_of_rank("rng", rank))) is not None:
        torch.set_rng_state(state)
    if (state := states.get(_of_rank("cuda_rng", rank))) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state)


def _of_rank(key: str, rank: int) -> str:
    return f"{key}.{rank}" if rank else key


def _saved_parameters(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    """All; beside a frozen base, which is as it was, only those that are trained."""
    parameters: dict[str, torch.nn.Parameter] = dict(trainer.model.named_parameters())
    if trainer.settings.lora is None:
        return parameters
    return {name: p for name, p in parameters.items() if p.requires_grad}


def _load_parameters(directory: Path, trainer: Trainer) -> None:
    saved = load_file(directory / "model.safetensors")
    parameters = _saved_parameters(trainer)
    _require_parameters(directory, {name: x.shape for name, x in saved.items()}, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    trainer.refresh()


def _require_parameters(
    directory: Path, saved: dict[str, torch.Size], parameters: dict[str, torch.nn.Parameter]
) -> None:
    """Raises CheckpointError where the saved tensors have other names or shapes than the trainer's."""
    wrong = sorted({name for name, _ in saved.items() ^ {name: x.shape for name, x in parameters.items()}.items()})
    if wrong:
        fact = f"{len(wrong)} tensors are not those of the base's model, the first: {wrong[0]}"
        raise CheckpointError(str(directory), fact, "resume on the base that the run was started from")


def _go_on_without(directory: Path) -> str:
    """How to go on where a saved state is damaged."""
    older = [p.name for p in saved_states(directory.parent) if p.name < directory.name]
    go_on = f"goes on from {older[-1]}" if older else "starts from the beginning (no older state is kept)"
    return f"remove the folder {directory}; --resume then {go_on}"


# ---- taking over the optimizer state of another run


def warm_start(base: Path, trainer: Trainer) -> str:
    """Give a fresh trainer the moments of the run that made `base` (its directory or checkpoint); says from where.
    They estimate the gradient's scale for every weight, so that the first steps need not.

    Rows that the embeddings have gained since start at zero. Raises CheckpointError where there is no saved state, or
    it is that of another optimizer or model.
    """
    run = base.parent if base.name == "checkpoint" else base
    states = saved_states(run / "resume")
    if not states:
        raise CheckpointError(str(run), "no optimizer state beside the base (resume/ is what holds it)", NO_WARM_START)
    newest = states[-1]
    check_hashes(newest, read_record(newest / "state.json", NO_WARM_START)["sha256"], NO_WARM_START)
    saved, _ = read_optimizers(newest)
    wanted = {
        (number, index): parameter
        for number, optimizer in enumerate(trainer.optimizers)
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    if saved.keys() != wanted.keys():
        raise CheckpointError(str(newest), "its optimizer state is that of another optimizer or model", NO_WARM_START)
    for (number, index), parameter in wanted.items():
        optimizer = trainer.optimizers[number]
        state = saved[number, index]
        if state.keys() != MOMENTS.get(type(optimizer), set()):
            raise CheckpointError(str(newest), f"its state is not that of {type(optimizer).__name__}", NO_WARM_START)
        optimizer.state[parameter] = {name: _with_new_rows(value, parameter, newest) for name, value in state.items()}
    return f"optimizer state taken over from {newest}"


def _with_new_rows(value: torch.Tensor, parameter: torch.Tensor, place: Path) -> torch.Tensor:
    """The moment in its parameter's shape: zeros for rows that were added to an embedding."""
    if value.ndim == 0:
        return value
    if value.shape[1:] != parameter.shape[1:] or len(value) > len(parameter):
        fact = f"a moment of shape {tuple(value.shape)} does not fit a weight of shape {tuple(parameter.shape)}"
        raise CheckpointError(str(place), fact, NO_WARM_START)
    out = torch.zeros_like(parameter, dtype=value.dtype)
    out[: len(value)] = value.to(parameter.device)
    return out
