"""The steps of I-OBS: on a quadratic one suffices; projections and supports against brute force."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from obsprune.core.iobs import (
    best_support,
    greedy_support,
    k_iht,
    obs_cost,
    obs_iobs,
    obs_project,
    stochastic_iobs,
    top_k,
    topk_iobs,
)

Step = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def quadratic(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """(H, w) in float64; H correlated and positive definite."""
    random = torch.Generator().manual_seed(seed)
    root = torch.randn(size, 2 * size, generator=random, dtype=torch.float64)
    return root @ root.T / size, torch.randn(size, generator=random, dtype=torch.float64)


def distance(w_D: Tensor, z_D: Tensor, H_DD: Tensor) -> float:
    return float((w_D - z_D) @ H_DD @ (w_D - z_D))


def test_top_k() -> None:
    assert top_k(torch.tensor([3.0, -1.0, -4.0, 2.0, 1.0]), 3).tolist() == [3, 0, -4, 2, 0]


@pytest.mark.parametrize("step", [topk_iobs, obs_iobs])
@pytest.mark.parametrize("seed", range(5))
def test_on_a_quadratic_one_step_suffices(step: Step, seed: int) -> None:
    """From any start: the Newton point of ½(w−w*)ᵀH(w−w*) is the k-sparse w* itself."""
    H_DD, start_D = quadratic(30, seed)
    goal_D = top_k(torch.randn(30, generator=torch.Generator().manual_seed(99 + seed)).double(), 6)
    found_D = step(start_D, H_DD @ (start_D - goal_D), H_DD.inverse(), 6)
    assert float((found_D - goal_D).norm()) < 1e-10


@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_the_refit_on_the_support(seed: int) -> None:
    """H_KK z = (H w)_K on the survivors K, and the cost is the distance it leaves."""
    H_DD, w_D = quadratic(12, seed)
    keep_D = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.5
    expected_D = torch.zeros_like(w_D)
    expected_D[keep_D] = torch.linalg.solve(H_DD[keep_D][:, keep_D], (H_DD @ w_D)[keep_D])
    found_D = obs_project(w_D, H_DD.inverse(), keep_D)
    torch.testing.assert_close(found_D, expected_D)
    assert obs_cost(w_D, H_DD.inverse(), keep_D) == pytest.approx(distance(w_D, found_D, H_DD))


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("seed", range(8))
def test_supports(seed: int, k: int) -> None:
    """Nothing is better than brute force, and greedy OBS was never more than half as bad again on these."""
    H_DD, w_D = quadratic(8, seed)
    V_DD = H_DD.inverse()
    before = V_DD.clone()
    costs = {
        "best": obs_cost(w_D, V_DD, best_support(w_D, V_DD, k)),
        "greedy": obs_cost(w_D, V_DD, greedy_support(w_D, V_DD, k)),
        "magnitude": obs_cost(w_D, V_DD, top_k(w_D, k) != 0),
    }
    assert int(greedy_support(w_D, V_DD, k).sum()) == int(best_support(w_D, V_DD, k).sum()) == k
    assert torch.equal(V_DD, before)  # a prepared inverse serves many steps
    assert costs["best"] <= min(costs["greedy"], costs["magnitude"]) * (1 + 1e-12)
    assert costs["greedy"] <= 1.5 * costs["best"]


def test_with_a_diagonal_hessian_greedy_is_best() -> None:
    _, w_D = quadratic(9, 1)
    H_DD = torch.diag(torch.arange(1.0, 10.0).double())
    V_DD = H_DD.inverse()
    assert torch.equal(greedy_support(w_D, V_DD, 4), best_support(w_D, V_DD, 4))
    assert torch.equal(greedy_support(w_D, V_DD, 4), top_k(w_D.square() * H_DD.diagonal(), 4) != 0)


def test_removing_one_weight_is_the_formula_of_obs() -> None:
    """Hassibi & Stork: saliency w_q²/[H⁻¹]_qq, update −w_q/[H⁻¹]_qq · H⁻¹e_q."""
    H_DD, w_D = quadratic(6, 3)
    inverse_DD = torch.linalg.inv(H_DD)
    q = int((w_D.square() / inverse_DD.diagonal()).argmin())
    keep_D = greedy_support(w_D, inverse_DD, 5)
    assert keep_D.logical_not().nonzero().tolist() == [[q]]
    torch.testing.assert_close(obs_project(w_D, inverse_DD, keep_D), w_D - w_D[q] / inverse_DD[q, q] * inverse_DD[:, q])


def test_k_iht_never_climbs_with_the_step_of_its_theory() -> None:
    H_DD, goal_D = quadratic(20, 4)
    goal_D, w_D = top_k(goal_D, 4), torch.zeros(20, dtype=torch.float64)
    step = 1 / float(torch.linalg.eigvalsh(H_DD)[-1])
    losses = []
    for _ in range(200):
        losses.append(distance(w_D, goal_D, H_DD))
        w_D = k_iht(w_D, H_DD @ (w_D - goal_D), step, 8)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(losses))
    assert losses[-1] < 0.01 * losses[0]


def test_stochastic_iobs_is_its_formula() -> None:
    w_D, g_D = torch.tensor([2.0, 0.0, -1.0, 0.0]), torch.tensor([3.0, 1.0, 4.0, -2.0])
    scale = 0.5 + (9 + 16) / 30**0.5
    expected_D = top_k(w_D - g_D / scale, 2)
    torch.testing.assert_close(stochastic_iobs(w_D, g_D, 0.5, 2), expected_D)
    assert torch.equal(stochastic_iobs(w_D, torch.zeros(4), 0.0, 2), w_D)
