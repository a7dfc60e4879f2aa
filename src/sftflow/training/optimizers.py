"""Optimizers and learning-rate schedules.

A new optimizer is one function (parameter groups in, a list of torch optimizers out) and one row in `OPTIMIZERS`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from sftflow.foundation.runtime import has_native_bf16
from sftflow.recipe import Schedule, Train

Groups = dict[str, list[torch.nn.Parameter]]

# Muon moves matrices by orthogonalised steps whose size does not depend on the gradient, so its learning rate
# is a fixed multiple of AdamW's in one recipe; `lr` is always AdamW's for the embeddings, norms and biases.
MUON_RATIO = 4.0
TOGETHER = 1 << 18
"""numbers of the matrices that Muon iterates together: what is made of them stays in the processor's cache"""


def groups_of(model: Any, *, frozen: bool = False) -> Groups:
    """Every trainable parameter by what it is: "matrices" (experts held as (experts, out, in), too), "embeddings" (the
    output projection among them), "rest".   frozen: those that are not trained, too."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            tables |= {id(p) for p in end.parameters() if p.ndim > 1}
    groups: Groups = {"matrices": [], "embeddings": [], "rest": []}
    for p in model.parameters():
        if p.requires_grad or frozen:
            groups["embeddings" if id(p) in tables else "matrices" if p.ndim >= 2 else "rest"].append(p)
    return groups


def _adamw_groups(groups: Groups, settings: Train) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms, biases and embeddings; each group its rate."""
    lr, decay = settings.peak_lr, {"matrices": settings.weight_decay}
    return [
        {
            "params": part,
            "lr": lr * getattr(settings.lr_scale, name),
            "weight_decay": decay.get(name, 0.0),
        }
        for name, group in groups.items()
        for sharded in (False, True)  # the fused kernel takes either kind, not both at once
        if (part := [p for p in group if isinstance(p, DTensor) == sharded])
    ]


def adamw(groups: Groups, settings: Train) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) for all."""
    used = _adamw_groups(groups, settings)
    return [torch.optim.AdamW(used, betas=(0.9, 0.95), eps=1e-8, fused=True)] if used else []


def adamw8bit(groups: Groups, settings: Train) -> list[torch.optim.Optimizer]:
    """AdamW with its moments in 8 bits, 256 numbers to a scale (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861),
    by torchao: 2 bytes a parameter in place of 8. Weights of fewer than 4,096 numbers, or not a multiple of 256, keep
    fp32 moments. Its step is compiled, once for each shape of a weight. Its rates are tensors, as `peak_lr` then is."""
    from torchao.optim import AdamW8bit

    warnings.filterwarnings("ignore", "OptimState8bit does not implement _stable_hash")  # what is compiled is cached
    used = _adamw_groups(groups, settings)
    return [AdamW8bit(used, betas=(0.9, 0.95), eps=1e-8)] if used else []


def muon(groups: Groups, settings: Train) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for everything else (experts too)."""
    matrices = [p for p in groups["matrices"] if p.ndim == 2]
    others = adamw(groups | {"matrices": [p for p in groups["matrices"] if p.ndim != 2]}, settings)
    if not matrices:
        return others
    rate = settings.peak_lr * MUON_RATIO * settings.lr_scale.matrices
    return [Muon(matrices, lr=rate, weight_decay=settings.weight_decay, momentum=0.95, nesterov=True), *others]


class OptimizerKind(NamedTuple):
    """make: builds it.   lr_tiny, lr_real: `lr: auto` for the tiny base (tuned on the demo, docs/decisions.md has the
    runs) and for full fine-tuning of a real checkpoint (the field's habit)."""

    make: Callable[[Groups, Train], list[torch.optim.Optimizer]]
    lr_tiny: float
    lr_real: float


OPTIMIZERS = {
    "adamw": OptimizerKind(adamw, 3e-3, 2e-5),
    "adamw8bit": OptimizerKind(adamw8bit, 3e-3, 2e-5),
    "muon": OptimizerKind(muon, 8e-3, 1e-5),
}


def make_optimizers(model: Any, settings: Train) -> list[torch.optim.Optimizer]:
    """The optimizers of all trainable parameters; each group remembers its peak rate as `peak_lr`."""
    optimizers = OPTIMIZERS[settings.optimizer].make(groups_of(model), settings)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


IN_8_BITS = ("codes", "scale", "qmap")


def moment_parts(value: Any) -> dict[str, torch.Tensor]:
    """What is saved of one value of an optimizer's state, by the ending of its name: itself, or of a moment in 8 bits
    the plain tensors it is made of ("codes" in its shape, "scale" of each block, "qmap": the 256 numbers that codes
    stand for)."""
    if not hasattr(value, "qmap"):
        return {"": torch.as_tensor(value).contiguous()}
    return {f".{name}": getattr(value, name).contiguous() for name in IN_8_BITS}


def joined_moments(saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One parameter's state again, out of what `moment_parts` made of each value, by names with their endings."""
    whole = {name: value for name, value in saved.items() if "." not in name}
    for name in {name.partition(".")[0] for name in saved.keys() - whole.keys()}:
        from torchao.optim.subclass_8bit import OptimState8bit

        codes, scale, qmap = (saved[f"{name}.{part}"] for part in IN_8_BITS)
        whole[name] = OptimState8bit(codes, scale, qmap, signed=bool(qmap[0] < 0))
    return whole


def numbered_parameters(
    model: Any, optimizers: list[torch.optim.Optimizer]
) -> dict[tuple[int, int], torch.nn.Parameter]:
    """Each trained parameter by (its optimizer's number, its own there): the same for any number of processes."""
    out: dict[tuple[int, int], torch.nn.Parameter] = {}
    of_kind = groups_of(model)
    for number, optimizer in enumerate(optimizers):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        ordered = [p for name in of_kind for p in of_kind[name] if id(p) in held]
        out |= {(number, index): p for index, p in enumerate(ordered)}
    return out


def lr_factor(step: int, total: int, schedule: Schedule) -> float:
    """The share of the peak learning rate at `step` (0-based) of `total`.

    linear: rise over the first `warmup` share, hold, fall in a straight line to `final` over the last `warmdown`.
    cosine: rise, then half a cosine to `final`.   constant: rise, then hold.

    >>> schedule = Schedule(kind="linear", warmup=0.2, warmdown=0.5, final=0.0)
    >>> [round(lr_factor(s, 10, schedule), 2) for s in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    final = schedule.final
    rise = math.ceil(total * schedule.warmup)
    if step < rise:
        return (step + 1) / rise
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        done = (step - rise) / max(1, total - rise)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    fall = max(1, round(total * schedule.warmdown))
    left = total - step
    return 1.0 if left >= fall else final + (1 - final) * left / fall


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) with the same state and settings.

    torch runs the Newton-Schulz iteration in bf16 everywhere. A CPU without bf16 products does that at a fiftieth of
    its fp32 speed, and the iteration then takes nearly all of a step: here it runs in fp32 on such machines.
    Small matrices of one shape are iterated together, as one product of many.
    A matrix of which each rank has some rows is orthogonalised whole by all of them.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for alike in _alike([p for p in group["params"] if p.grad is not None]):
                self._step(alike, group)

    def _step(self, alike: list[torch.Tensor], group: dict[str, Any]) -> None:
        updates, first = [], alike[0]
        dtype = torch.bfloat16 if has_native_bf16(first.device.type) else torch.float32
        for p in alike:
            state, grad = self.state[p], p.grad
            assert grad is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            updates.append((update.full_tensor() if isinstance(update, DTensor) else update).to(dtype))
        whole = orthogonalised(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
        length = math.sqrt(max(1.0, first.shape[0] / first.shape[1]))
        for p, update in zip(alike, whole, strict=True):
            if isinstance(p, DTensor):  # each rank keeps its rows of what all have computed
                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * length)


def _alike(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The matrices by shape and device, as many together as have `TOGETHER` numbers."""
    by_kind: dict[Any, list[torch.Tensor]] = {}
    for p in parameters:
        by_kind.setdefault((p.shape, p.device, isinstance(p, DTensor)), []).append(p)
    for (shape, *_), alike in by_kind.items():
        n = max(1, TOGETHER // shape.numel())
        yield from (alike[start : start + n] for start in range(0, len(alike), n))


def orthogonalised(matrices: torch.Tensor, a_b_c: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """U S' V^T of each matrix U S V^T, S' near 1: X <- P X with P = a + b A + c A A and A = X X^T, `steps` times.

    matrices: (n, rows, columns), or one.   Each is divided by its norm first, and iterated on the side where A is the
    smaller one.
    """
    a, b, c = a_b_c
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x.reshape(-1, *x.shape[-2:])
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    if x.dtype == torch.float32 and 2 * x.shape[2] > 3 * x.shape[1]:
        x = torch.bmm(_product(torch.bmm(x, x.mT), a_b_c, steps), x)
    else:
        for _ in range(steps):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def _product(gram: torch.Tensor, a_b_c: tuple[float, float, float], steps: int) -> torch.Tensor:
    """All steps' P multiplied, (n, rows, rows), of A = X X^T: the next A is P A P, so that X need not be seen again. It
    saves a third of the work where X is wide, and needs fp32: in bf16 small singular values would be lost."""
    a, b, c = a_b_c

    def factor(gram: torch.Tensor) -> torch.Tensor:
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        return p

    product = p = factor(gram)
    for _ in range(steps - 1):
        gram = torch.bmm(torch.bmm(p, gram), p)
        p = factor(gram)
        product = torch.bmm(p, product)
    return product
