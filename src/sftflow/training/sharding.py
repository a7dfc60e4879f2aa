"""A model over several processes, by PyTorch's own collectives.

replicated   every rank has the whole model; gradients are summed by one all-reduce
sharded      FSDP2: each rank keeps its rows of every matrix, of its gradient and of its moments, and has the whole of a
             layer's only while that layer computes (Zhao et al. 2023, "PyTorch FSDP")

In a sharded model all that is small stays replicated: norms, biases, an adapter beside a frozen base; and the frozen
base's embedding and head, which have neither gradients nor moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from sftflow.foundation.ranks import Ranks
from sftflow.foundation.rounding import round_bf16
from sftflow.packing.loss import Head, body_of
from sftflow.training.bf16_weights import CLASSES, decoder_layers

FP32 = torch.float32


def shard(model: Any, ranks: Ranks, device: str, *, bf16: bool) -> None:
    """Leave each rank its rows of the model's matrices, on its device; the model computes what it did.

    The whole model is in the machine's memory until then, of every rank, and never on the device.
    bf16: the matrices that `Bf16Weights` would round are gathered in bf16, rounded by the same rule.
    """
    mesh = init_device_mesh(device, (ranks.world,))  # with gloo it must be said that tensors are on the CPU
    small, beside_frozen = set(small_parameters(model)), not all(p.requires_grad for p in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    for layer in decoder_layers(model):
        for module in reversed(list(layer.modules())):
            odd = any(p.requires_grad and p not in small for p in module.parameters(recurse=False))
            if bf16 and odd and type(module) not in CLASSES:  # its gradient has another type than the layer's others
                _shard_module(module, mesh, small)
        _shard_module(layer, mesh, small)
        if bf16:
            for module in layer.modules():
                if type(module) in CLASSES and isinstance(module.weight, DTensor) and module.weight.dtype == FP32:
                    _gather_rounded(module.weight, ranks)
    if not beside_frozen:
        _shard_module(embedding, mesh, small)
        # The loss multiplies by the head itself and adds to its gradient, so that no hook of FSDP would ever run.
        head.weight = embedding.weight if tied else _distributed(head.weight, mesh)
    # The body is what FSDP calls the root: with one above them all, the next layer is gathered while one computes.
    body = body_of(model)
    _shard_module(body, mesh, {p for p in body.parameters() if not isinstance(p, DTensor)})
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)


def _shard_module(module: torch.nn.Module, mesh: DeviceMesh, small: set[torch.nn.Parameter]) -> None:
    fully_shard(
        module,
        mesh=mesh,
        ignored_params=small,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        reshard_after_forward=True,
    )
    fully: Any = module
    fully.set_gradient_divide_factor(1.0)  # a sum: each rank has divided by the supervised tokens of all
    fully.set_force_sum_reduction_for_comms(True)


def _distributed(weight: torch.nn.Parameter, mesh: DeviceMesh) -> torch.nn.Parameter:
    return torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]), requires_grad=weight.requires_grad)


def small_parameters(model: Any) -> Iterator[torch.nn.Parameter]:
    """What every rank keeps whole: vectors, what a module holds itself beside its linear layers (a gate: in one group
    with them its gradient would be of another type), and all that is trained beside a frozen base."""
    beside_frozen = not all(p.requires_grad for p in model.parameters())
    holders = [m for m in model.modules() if any(isinstance(child, tuple(CLASSES)) for child in m.children())]
    beside_linear = {p for module in holders for p in module.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter in beside_linear or (beside_frozen and parameter.requires_grad):
            yield parameter


def _gather_rounded(weight: DTensor, ranks: Ranks) -> None:
    """Let FSDP gather this weight in bf16, each rank rounding its rows as one device would round them."""
    rows, local = weight.shape[0], weight._local_tensor
    per_rank = rows_of_rank(rows, ranks)

    def before(mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> tuple[tuple[torch.Tensor], None]:
        out = torch.zeros(per_rank, *weight.shape[1:], dtype=torch.bfloat16, device=local.device)
        round_bf16(local, out[: len(local)], first_row=ranks.rank * per_rank)
        return (out,), None

    def after(gathered: tuple[torch.Tensor], _: None, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> Any:
        return None if out is not None else (gathered[0][:rows], gathered)

    hooked: Any = local
    hooked.fsdp_pre_all_gather, hooked.fsdp_post_all_gather = before, after


@torch.no_grad()
def gathered_head(head: Head, ranks: Ranks, *, bf16: bool, trained: bool) -> Head:
    """A sharded output projection as the loss needs it: whole, rounded to bf16 where products run in that, with room
    for this rank's gradient of it where it is `trained`. Others are given back as they are."""
    weight = head.weight
    if not isinstance(weight, DTensor):
        return head
    grad = torch.zeros(weight.shape, device=weight.device) if trained and weight.requires_grad else None
    if not bf16:
        return replace(head, weight=weight.full_tensor(), grad=grad)
    rounded = round_bf16(weight.to_local(), first_row=ranks.rank * rows_of_rank(weight.shape[0], ranks))
    full = DTensor.from_local(
        rounded, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    ).full_tensor()
    return replace(head, weight=full, bf16=full, grad=grad)


def rows_of_rank(rows: int, ranks: Ranks) -> int:
    """How many of a matrix's rows each rank keeps; the last ones get fewer, or none, where they do not divide."""
    return -(-rows // ranks.world)


def add_gradient(weight: torch.Tensor, mine: torch.Tensor) -> None:
    """Add this rank's gradient of a sharded weight, the whole of it, to what each rank keeps of all ranks' sum."""
    assert isinstance(weight, DTensor)
    part = DTensor.from_local(mine, weight.device_mesh, [Partial()]).redistribute(placements=weight.placements)
    assert isinstance(weight.grad, DTensor)
    weight.grad.to_local().add_(part.to_local())


class Gradients:
    """The gradients of the trained parameters: allocated once and for all, summed over ranks, clipped.

    Made anew each step among activations that come and go they would leave the heap full of holes; and where it is
    there, that of the token embedding can be sparse (`attending`). Those of a replicated model lie in one piece, so
    that one collective sums them all.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> None:
        self.ranks = ranks
        self.sharded = [p for p in parameters if isinstance(p, DTensor)]
        self.whole = [p for p in parameters if not isinstance(p, DTensor)]
        self.flat: list[torch.Tensor] = []
        if ranks.world > 1:
            for dtype in {p.dtype: None for p in self.whole}:
                self._in_one_piece([p for p in self.whole if p.dtype == dtype])
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _in_one_piece(self, parameters: list[torch.nn.Parameter]) -> None:
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
        self.flat.append(flat)
        for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view(parameter.shape)

    def sum_over_ranks(self) -> None:
        """Add up the replicated parameters' gradients; those of sharded ones are summed as they are computed."""
        for flat in self.flat:
            dist.all_reduce(flat)

    def clip(self, bound: float) -> float:
        """The norm of the whole gradient, which is scaled down to `bound` where it is larger."""
        if not self.sharded:
            return float(torch.nn.utils.clip_grad_norm_(self.whole, bound))
        local = [p.grad.to_local() for p in self.sharded]
        squares = torch.stack([x.double().square().sum() for x in local]).sum()
        dist.all_reduce(squares)
        for parameter in self.whole:
            squares += parameter.grad.double().square().sum()  # type: ignore[union-attr]
        norm = math.sqrt(float(squares)) if bool(squares.isfinite()) else float(squares)
        if norm > bound:
            torch._foreach_mul_([*local, *(p.grad for p in self.whole)], min(1.0, bound / (norm + 1e-6)))
        return norm
