"""Muon against torch's own, and against the singular vectors that it aims at."""

from __future__ import annotations

import pytest
import torch

from sftflow.training import optimizers
from sftflow.training.optimizers import Muon, orthogonalised

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
SHAPES = [(24, 64), (64, 24), (32, 32)]
NS = ((3.4445, -4.7750, 2.0315), 5, 1e-7)


def steps_of(kind: type[torch.optim.Muon], n: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(*shape)) for shape in SHAPES]
    optimizer = kind(weights, **SETTINGS)
    for _ in range(n):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return [w.detach() for w in weights]


@pytest.mark.parametrize(("native", "bound"), [(True, 0.0), (False, 4e-2)])
def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, native: bool, bound: float) -> None:
    """To the bit in bf16. In fp32 the steps differ by what bf16 rounds: of the length of a step, a few per cent."""
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda device: native)
    for ours, theirs in zip(steps_of(Muon), steps_of(torch.optim.Muon), strict=True):
        assert float((ours - theirs).norm()) <= bound * 4 * SETTINGS["lr"] * theirs.shape[0] ** 0.5 * 1.7


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(*shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix, *NS)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.4 and float(values.max()) < 1.4
    between = u.T @ found @ v.T  # diagonal: the singular vectors are the matrix's own
    assert float((between - between.diagonal().diag()).abs().max()) < 1e-3


@pytest.mark.parametrize("noise", [1.0, 1e-5, 0.0])
def test_the_shorter_way_of_wide_matrices_is_the_same(noise: float) -> None:
    """In fp32 it is within rounding of the plain iteration in float64, of a matrix of rank 5 with or without noise,
    too; matrices iterated together are what each is alone."""
    torch.manual_seed(2)
    few = torch.randn(3, 24, 5) @ torch.randn(3, 5, 64) + noise * torch.randn(3, 24, 64)
    found, (a, b, c) = orthogonalised(few, *NS), NS[0]
    for matrix, result in zip(few, found, strict=True):
        x = matrix.double() / matrix.double().norm()
        for _ in range(NS[1]):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        assert float((result - x).norm() / x.norm()) < 2e-4
        torch.testing.assert_close(orthogonalised(matrix.T, *NS).T, result, rtol=1e-4, atol=1e-4)
    assert not orthogonalised(torch.zeros(24, 64), *NS).any()


def test_the_state_is_torchs() -> None:
    """A run saved with one goes on with the other."""
    for saved, loaded in ((Muon, torch.optim.Muon), (torch.optim.Muon, Muon)):
        weight = torch.nn.Parameter(torch.ones(4, 4))
        weight.grad = torch.ones(4, 4)
        first, second = saved([weight], **SETTINGS), loaded([weight], **SETTINGS)
        first.step()
        second.load_state_dict(first.state_dict())
        assert torch.equal(second.state[weight]["momentum_buffer"], first.state[weight]["momentum_buffer"])
