"""Norms and rotary embedding on a CPU, in few passes over memory.

By autograd either is five to ten passes over the activations forward, and twice as many backward: in a narrow model
that is much beside its matrix products. Here they have their backward pass in closed form, compute a few rows at a time
that stay in the processor's cache, and keep no more than what they were given.

They are used where a module runs the very code of the one in transformers that they stand for (most architectures have
copies of Llama's), in fp32, on a CPU, uncompiled; everything else computes as it did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch

CHUNK = 1 << 16
"""numbers computed at a time"""
Change = tuple[Any, str, Any]


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The rows of all the tensors, about CHUNK numbers of each at a time."""
    return zip(*(t.split(max(1, CHUNK // tensors[0].shape[-1])) for t in tensors), strict=True)


class RMSNorm(torch.autograd.Function):
    """y = x r w,  r = 1 / sqrt(mean(x^2) + eps).   (rows, width) in and out.

    dw = sum over rows of g x r,   dx = r (g w - x r^2 mean(g w x)).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # type: ignore[override]
        out, roots = torch.empty_like(x), x.new_empty(len(x), 1)
        for some, result, root in pieces(x, out, roots):
            torch.linalg.vector_norm(some, dim=-1, keepdim=True, out=root)
            root.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            torch.mul(some, root, out=result).mul_(weight)
        ctx.save_for_backward(x, weight, roots)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, roots = ctx.saved_tensors
        d_x, d_weight, buffer = torch.empty_like(x), torch.zeros_like(weight), None
        for some, g, root, result in pieces(x, grads[0], roots, d_x):
            product = torch.mul(some, g, out=buffer[: len(some)] if buffer is not None else None)
            buffer = product if buffer is None else buffer
            d_weight.addmv_(product.T, root[:, 0])
            inner = torch.mv(product, weight)[:, None].mul_(root).mul_(root).mul_(root).div_(-x.shape[1])
            torch.mul(g, weight, out=result).mul_(root).addcmul_(some, inner)
        return d_x, d_weight, None


class Rotary(torch.autograd.Function):
    """x cos + (-x2, x1) sin of the halves (x1, x2) of each vector.   x: (slots, heads, size).   cos, sin: (slots, 1,
    size).   Its transpose backward: g cos + ((g sin)2, -(g sin)1)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        out, half = torch.empty_like(x), x.shape[-1] // 2
        for some, c, s, result in _slots(x, cos, sin, out):
            torch.mul(some, c, out=result)
            result[..., :half].addcmul_(some[..., half:], s[..., :half], value=-1)
            result[..., half:].addcmul_(some[..., :half], s[..., half:])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        g = grads[0].contiguous()
        out, half = torch.empty_like(g), g.shape[-1] // 2
        for some, c, s, result in _slots(g, cos, sin, out):
            torch.mul(some, c, out=result)
            result[..., :half].addcmul_(some[..., half:], s[..., half:])
            result[..., half:].addcmul_(some[..., :half], s[..., :half], value=-1)
        return out, None, None


def _slots(x: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    rows = max(1, CHUNK // x[0].numel())
    return zip(*(t.split(rows) for t in (x, *others)), strict=True)


def _fits(*tensors: torch.Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def _norm(module: Any, plain: Callable[..., Any], offset: float, x: torch.Tensor) -> Any:
    if not _fits(x, module.weight):
        return plain(x)
    weight = module.weight + offset if offset else module.weight
    eps = module.eps if offset else module.variance_epsilon
    return RMSNorm.apply(x.view(-1, x.shape[-1]), weight, eps).view(x.shape)


def _rotary(plain: Any, q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    """`apply_rotary_pos_emb`: q, k (1, heads, slots, size); cos, sin (1, slots, size)."""
    by_slot = [x.transpose(1, 2)[0] for x in (q, k)]
    if unsqueeze_dim != 1 or len(q) != 1 or len(cos) != 1 or cos.requires_grad or not _fits(*by_slot, cos, sin):
        return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    c, s = (x[0][:, None] for x in (cos, sin))
    return tuple(Rotary.apply(x, c, s)[None].transpose(1, 2) for x in by_slot)


@cache
def _same_code(ours: Any, theirs: Any) -> bool:
    """Whether two functions compute the same, instruction by instruction (most of transformers' are copies), in all
    that they call by name of their own file."""
    if not (isinstance(ours, FunctionType) and isinstance(theirs, FunctionType)):
        return ours is theirs
    a, b = ours.__code__, theirs.__code__
    numbers = [[c for c in code.co_consts if not isinstance(c, str)] for code in (a, b)]
    if (a.co_code, a.co_names, numbers[0]) != (b.co_code, b.co_names, numbers[1]):
        return False
    return ours.__defaults__ == theirs.__defaults__ and all(
        _same_code(ours.__globals__.get(name), theirs.__globals__.get(name)) for name in a.co_names
    )


@cache
def _offset(owner: type[torch.nn.Module]) -> float | None:
    """What this class adds to the weight of its RMS norm: Llama's 0, Gemma's 1; None where it is neither of these."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    forward = owner.forward
    if _same_code(forward, LlamaRMSNorm.forward):
        return 0.0
    same = _same_code(forward, GemmaRMSNorm.forward) and _same_code(getattr(owner, "_norm", None), GemmaRMSNorm._norm)
    return 1.0 if same else None


def fused(model: Any) -> list[Change]:
    """The (object, attribute, value) under which this model computes in few passes (see `attending.changed`)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    if model.device.type != "cpu":
        return []
    changes: list[Change] = []
    files: set[str] = set()
    for module in model.modules():
        if module._compiled_call_impl is not None:
            return []
        files.add(type(module).__module__)
        offset = None if "forward" in vars(module) else _offset(module.__class__)
        if offset is not None:
            changes.append((module, "forward", partial(_norm, module, module.forward, offset)))
    for file in files:
        theirs = getattr(sys.modules[file], "apply_rotary_pos_emb", None)
        if theirs is not None and _same_code(theirs, apply_rotary_pos_emb):
            changes.append((sys.modules[file], "apply_rotary_pos_emb", partial(_rotary, theirs)))
    return changes
