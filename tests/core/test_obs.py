from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obsprune.core.obs import (
    deletion_step,
    hold,
    inverse_hessian,
    plane_costs,
    plane_step,
    saliency,
    sharing_planes,
)

SIZE = 6


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """A point and a Hessian far from diagonal."""
    X = rand(20, SIZE) + 1
    return rand(SIZE, seed=1), X.T @ X / 20


def least_on_plane(H: Tensor, w: Tensor, a: Tensor, b: float) -> tuple[Tensor, float]:
    """The minimiser of ½ δᵀHδ with aᵀ(w+δ) = b from the optimality system, and its cost: no formula of the module."""
    system = torch.zeros(SIZE + 1, SIZE + 1, dtype=torch.float64)
    system[:SIZE, :SIZE], system[:SIZE, SIZE], system[SIZE, :SIZE] = H, a, a
    right = torch.zeros(SIZE + 1, dtype=torch.float64)
    right[SIZE] = b - a @ w
    delta = torch.linalg.solve(system, right)[:SIZE]
    return delta, float(delta @ H @ delta / 2)


@pytest.mark.parametrize("alpha", [1e-8, 1e-4, 1.0])
@pytest.mark.parametrize("outputs", [1, 3])
def test_recursion_is_the_inverse(alpha: float, outputs: int) -> None:
    X = rand(30 * outputs, SIZE)
    H = alpha * torch.eye(SIZE, dtype=torch.float64) + X.T @ X / 30
    torch.testing.assert_close(
        inverse_hessian(X, 30, alpha) @ H, torch.eye(SIZE, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_recursion_takes_many_nets_and_few_patterns() -> None:
    X = rand(4, 3, SIZE)  # three patterns, six weights: regular by α alone
    H = 1e-3 * torch.eye(SIZE, dtype=torch.float64) + X.mT @ X / 3
    torch.testing.assert_close(inverse_hessian(X, 3, 1e-3), torch.linalg.inv(H), rtol=1e-8, atol=1e-8)


def test_saliency_is_the_least_increase(problem: tuple[Tensor, Tensor]) -> None:
    w, H = problem
    expected = [least_on_plane(H, w, a, 0.0)[1] for a in torch.eye(SIZE, dtype=torch.float64)]
    torch.testing.assert_close(saliency(w, torch.linalg.inv(H)), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("q", range(SIZE))
def test_deletion_is_the_minimiser(problem: tuple[Tensor, Tensor], q: int) -> None:
    w, H = problem
    step = deletion_step(w, torch.linalg.inv(H), q)
    torch.testing.assert_close(step, least_on_plane(H, w, torch.eye(SIZE, dtype=torch.float64)[q], 0.0)[0])
    assert abs(float(w[q] + step[q])) < 1e-14


@pytest.mark.parametrize("b", [0.0, 0.7])
def test_planes_cost_what_their_steps_raise(problem: tuple[Tensor, Tensor], b: float) -> None:
    w, H = problem
    A, inverse = rand(5, SIZE, seed=2), torch.linalg.inv(H)
    for a, cost in zip(A, plane_costs(w, inverse, A, b), strict=True):
        delta, expected = least_on_plane(H, w, a, b)
        torch.testing.assert_close(plane_step(w, inverse, a, b), delta)
        assert float(cost) == pytest.approx(expected)


def test_diagonal_and_identity_are_obd_and_magnitude() -> None:
    w, h = rand(SIZE), rand(SIZE, seed=1).abs()
    axes = torch.eye(SIZE, dtype=torch.float64)
    torch.testing.assert_close(plane_costs(w, torch.diag(1 / h), axes), h * w.square() / 2)
    assert int(plane_costs(w, axes, axes).argmin()) == int(w.abs().argmin())
    assert torch.equal(plane_step(w, axes, axes[2]), -w * axes[2])  # nothing but the deleted weight moves


def test_held_planes_cannot_be_chosen_again(problem: tuple[Tensor, Tensor]) -> None:
    w, H = problem
    free = hold(torch.eye(SIZE, dtype=torch.float64), torch.eye(SIZE, dtype=torch.float64)[1])
    assert torch.equal(free.diagonal(), torch.tensor([1.0, 0, 1, 1, 1, 1], dtype=torch.float64))
    costs = plane_costs(w, torch.linalg.inv(H), torch.eye(SIZE, dtype=torch.float64) @ free)
    assert costs.isinf().tolist() == [False, True, False, False, False, False]


def test_sharing_planes_are_pairs_within_groups() -> None:
    A = sharing_planes([[0, 1, 2], [4, 5]], SIZE)
    assert A.shape == (2 * (3 + 1), SIZE)
    w = torch.tensor([3.0, 3, -3, 9, 1, -1], dtype=torch.float64)
    assert (A @ w == 0).sum() == 4  # 0=1, 0=−2, 1=−2 and 4=−5


def test_sharing_makes_weights_equal(problem: tuple[Tensor, Tensor]) -> None:
    w, H = problem
    w = w + plane_step(w, torch.linalg.inv(H), sharing_planes([[0, 3]], SIZE)[0])
    assert float(w[0]) == pytest.approx(float(w[3]), abs=1e-14) and abs(float(w[0])) > 1e-3
