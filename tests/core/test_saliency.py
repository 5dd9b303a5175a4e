"""Scores against their formulas; curvature diagonals against autograd, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from obsprune.core.saliency import (
    Evidence,
    FirstOrder,
    Kronecker,
    Magnitude,
    OptimalBrainDamage,
    Saliency,
    Squares,
    Taylor,
    empirical,
    gauss_newton,
)


@pytest.mark.parametrize(
    ("saliency", "expected"),
    [
        (Magnitude(), [2.0, 3.0]),
        (FirstOrder(), [1.0, 6.0]),
        (Taylor(), [abs(-1.0 + 0.5 * 3 * 4), abs(6.0 + 0.5 * 1 * 9)]),
        (OptimalBrainDamage(), [6.0, 4.5]),
    ],
)
def test_scores(saliency: Saliency, expected: list[float]) -> None:
    evidence = Evidence(torch.tensor([[0.5, 2.0]]), torch.tensor([[3.0, 1.0]]))
    assert saliency.score(torch.tensor([[2.0, -3.0]]), evidence).tolist() == [expected]


def test_taylor_is_the_rise_of_a_quadratic_loss() -> None:
    # L(w) = 1 + g (w − w₀) + ½ h (w − w₀)²: removing w₀ moves by −w₀, exactly −g w₀ + ½ h w₀²
    w, g, h = torch.tensor([[0.7]]), torch.tensor([[-0.3]]), torch.tensor([[1.9]])
    rise = g * (0 - w) + h * (0 - w).square() / 2
    assert torch.allclose(Taylor().score(w, Evidence(g, h)), rise.abs())


@pytest.mark.parametrize("tokens", [1, 3])
def test_squares_are_those_of_every_sample(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(5, tokens, width, generator=generator) for width in (4, 3))
    slow = sum(sum(torch.outer(d[b, t], x[b, t]) for t in range(tokens)) ** 2 for b in range(5))
    squares = Squares()
    squares.add(x[:2], d[:2])
    squares.add(x[2:], d[2:])
    assert torch.allclose(squares.sum_RC, torch.as_tensor(slow), rtol=1e-5)


def test_kronecker_is_exact_for_one_token_and_not_for_two_that_depend() -> None:
    x, d = torch.tensor([[[1.0, 2.0]], [[3.0, 0.5]]]), torch.tensor([[[2.0]], [[0.1]]])
    one, both, squares = Kronecker(), Kronecker(), Squares()
    one.add(x[:1], d[:1])
    assert torch.allclose(one.sum_RC, torch.tensor([[4.0, 16.0]]))
    both.add(x, d)
    squares.add(x, d)
    assert torch.allclose(both.sum_RC, torch.tensor([[(4 + 0.01) * 5, (4 + 0.01) * 2.125]]))
    assert not torch.allclose(both.sum_RC, squares.sum_RC)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z, y)


def squared(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().sum(1).mean()


def test_roots_of_the_output_hessian() -> None:
    z, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 1, 1])
    p = z.softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    roots = torch.stack(list(gauss_newton(z, y, cross_entropy)), 2)
    assert torch.allclose(roots @ roots.mT, expected, atol=1e-6)
    roots = torch.stack(list(gauss_newton(z, torch.zeros(4, 3), squared)), 2)
    assert torch.allclose(roots @ roots.mT, 2 * torch.eye(3).expand(4, 3, 3), atol=1e-6)


@pytest.mark.parametrize("scale", [30, 100, 1000])
def test_roots_where_the_network_is_sure_of_itself(scale: float) -> None:
    for seed in range(5):  # float32 fails on some of these
        z = scale * torch.randn(128, 10, generator=torch.Generator().manual_seed(seed))
        p = z.softmax(1)
        roots = torch.stack(list(gauss_newton(z, torch.zeros(128, dtype=torch.long), cross_entropy)), 2)
        assert torch.allclose(roots @ roots.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], atol=1e-5)


def test_empirical_gradient_is_of_each_sample_alone() -> None:
    z, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 1, 1])
    (found,) = empirical(z, y, cross_entropy)
    assert torch.allclose(found, z.softmax(1) - functional.one_hot(y, 3), atol=1e-6)
