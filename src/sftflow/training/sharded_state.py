"""The state of a sharded run: each rank writes its rows of every matrix and of its moments, and nothing is gathered.

    resume/step-00000200/   shard-0000R-model-*.safetensors   what rank R - 1 keeps
                            rest.safetensors                  step counts, random states
                            state.json                        the hash of each file, and what every state has

They are torch.distributed.checkpoint's, in its safetensors format and not in its own, whose index is a pickle. It reads
them back into any other number of processes, and the files of a run in one process, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from sftflow.training.optimizers import joined_moments, numbered_parameters
from sftflow.training.trainer import Trainer

Tensors = dict[str, torch.Tensor]
REST = "rest.safetensors"


def write_shards(directory: Path, trainer: Trainer, parameters: Tensors, rest: Tensors) -> None:
    """Write this rank's part; all ranks come here together.   rest: small ones, which the first rank writes."""
    tensors = dict(parameters)
    for (number, index), parameter in numbered_parameters(trainer.model, trainer.optimizers).items():
        for key, value in trainer.optimizers[number].state.get(parameter, {}).items():
            (tensors if value.ndim else rest)[f"{number}/{index}/{key}"] = value
    if trainer.ranks.first:
        save_file(rest, directory / REST)
    with _quietly():
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))


def stored_sizes(directory: Path) -> dict[str, torch.Size]:
    """The whole size of every tensor of a saved state, by name."""
    with _quietly():
        found = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    return {name: getattr(data, "size", torch.Size()) for name, data in found.items()}


def read_small(directory: Path, sizes: dict[str, torch.Size]) -> Tensors:
    """The step counts and random states of a saved state: what no rank has a part of."""
    small = {name for name, size in sizes.items() if not size or "rng" in name}
    out: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys() if name in small}  # noqa: SIM118 - no mapping
    return out


def read_shards(directory: Path, trainer: Trainer, parameters: Tensors, sizes: dict[str, torch.Size]) -> None:
    """Read into the parameters, and into new moments of the optimizers, what of them is this rank's; all ranks come
    here together, as many as there are now."""
    small = read_small(directory, sizes)
    moments: dict[torch.Tensor, Tensors] = {}
    wanted = {name: parameter.detach() for name, parameter in parameters.items()}
    numbered = numbered_parameters(trainer.model, trainer.optimizers)
    for name in sizes:
        if name.count("/") != 2:
            continue
        number, index, key = name.split("/")
        parameter = numbered[int(number), int(index)]
        value = small[name] if name in small else torch.zeros_like(parameter, requires_grad=False)
        moments.setdefault(parameter, {})[key] = value
        if name not in small:
            wanted[name] = value
    with _quietly():
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=trainer.ranks.world == 1)
    for (which, _), parameter in numbered.items():
        if parameter in moments:
            trainer.optimizers[which].state[parameter] = joined_moments(moments[parameter])


@contextmanager
def _quietly() -> Iterator[None]:
    """torch warns of running in one process, which is meant, and of functions of its own. What went wrong on a rank is
    raised as it was there, on all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CheckpointException as error:
            (cause, _), *_ = error.failures.values()
            raise cause from error
