"""The bounds: constants against the Hessians themselves, the factors against brute force, and a small run."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from obsprune.core.iobs import best_support
from obsprune.progress import Silent
from obsprune.studies.base import Outcome
from obsprune.studies.bound import ConvergenceBound
from obsprune.studies.curved import (
    OPTIONS,
    Obs,
    Problem,
    Shape,
    Topk,
    attempt,
    climb,
    draw_problem,
    printed_factor,
    starts,
    step,
)
from obsprune.studies.material import Material

SHAPE = Shape(6, 2, 3)


def problem(seed: int) -> Problem:
    return draw_problem(SHAPE, seed, torch.Generator().manual_seed(seed))


def run(**settings: object) -> Outcome:
    small = {"seeds": 2, "small": SHAPE, "large": Shape(20, 3, 8), "starts": 8, "climb": 4, **settings}
    return ConvergenceBound(**small).run(Material(), Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_gradient_and_hessian_are_the_derivatives(seed: int) -> None:
    """Of Σ u²/2 + c·(log cosh(u + s) − tanh(s)·u), by autograd; the gradient is 0 at θ*."""
    one = problem(seed)

    def loss(point: torch.Tensor) -> torch.Tensor:
        u = one.sensing @ (point - one.goal)
        return (u.square() / 2 + one.bump * (torch.cosh(u + one.shift).log() - torch.tanh(one.shift) * u)).sum()

    point = one.goal + torch.randn(6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    torch.testing.assert_close(one.gradient(point), torch.func.grad(loss)(point))
    torch.testing.assert_close(one.hessian(point), torch.func.hessian(loss)(point))
    assert float(one.gradient(one.goal).norm()) < 1e-12
    assert int((one.goal != 0).sum()) == SHAPE.nonzeros


@pytest.mark.parametrize("seed", range(4))
def test_the_constants_are_true(seed: int) -> None:
    """μ ≤ ∇²f ≤ L at many points, and finite differences of the Hessian stay below M."""
    one, random = problem(seed), torch.Generator().manual_seed(seed)
    smallest, largest, lipschitz = one.constants
    for exponent in range(200):
        point = one.goal + 10 ** (exponent / 100 - 1) * torch.randn(6, generator=random, dtype=torch.float64)
        change = 10 ** (-exponent / 50) * torch.randn(6, generator=random, dtype=torch.float64)
        eigenvalues = torch.linalg.eigvalsh(one.hessian(point))
        assert smallest * (1 - 1e-12) <= float(eigenvalues[0]) <= float(eigenvalues[-1]) <= largest * (1 + 1e-12)
        difference = torch.linalg.matrix_norm(one.hessian(point + change) - one.hessian(point), 2)
        assert float(difference) <= lipschitz * float(change.norm()) * (1 + 1e-9)


def test_with_the_identity_m_is_sharp() -> None:
    """At θ* one entry stands where its curvature changes fastest: M cannot be smaller."""
    one = problem(1)
    change = 1e-5 * torch.eye(6, dtype=torch.float64)[0]
    difference = torch.linalg.matrix_norm(one.hessian(one.goal + change) - one.hessian(one.goal), 2)
    assert float(difference / 1e-5) == pytest.approx(one.constants[2], rel=1e-3)


def test_factors() -> None:
    shape = Shape(10, 2, 6)
    assert Topk().factor(5.0, shape) == 1 + math.sqrt(2 / 6)
    assert Obs(best_support).factor(5.0, shape) == 1 + math.sqrt(5 * 4 / 8)
    assert printed_factor(5.0, shape) == 1 + math.sqrt(5 * 8 / 4)


@pytest.mark.parametrize("seed", range(6))
def test_the_ratio_of_option_2_comes_from_the_mean_over_supports(seed: int) -> None:
    """The cost of the best support ≤ (d−k)/(d−k*) · ‖θ⁺ − θ*‖²_H: the step the printed ratio gets upside down."""
    one, random = problem(seed), torch.Generator().manual_seed(seed)
    hessian = one.hessian(one.goal)
    for _ in range(20):
        newton = one.goal + torch.randn(6, generator=random, dtype=torch.float64)
        costs = []
        for kept in map(list, combinations(range(6), SHAPE.survivors)):
            refit = torch.zeros_like(newton)
            refit[kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ newton)[kept])
            costs.append(float((newton - refit) @ hessian @ (newton - refit)))
        error = newton - one.goal
        assert min(costs) <= (6 - 3) / (6 - 2) * float(error @ hessian @ error) * (1 + 1e-12)
        _, found = newton, OPTIONS["exact"].project(newton, torch.linalg.inv(hessian), SHAPE.survivors)
        assert float((newton - found) @ hessian @ (newton - found)) == pytest.approx(min(costs), rel=1e-9)


def test_a_trial_compares_one_step_with_its_bound() -> None:
    one = problem(0)
    point = starts(one, 3, torch.Generator().manual_seed(0))[1]
    trial = attempt(one, OPTIONS["topk"], point)
    smallest, _, lipschitz = one.constants
    newton, following = step(one, OPTIONS["topk"], point)
    assert trial.before == float((point - one.goal).norm())
    assert trial.bound == pytest.approx((1 + math.sqrt(2 / 3)) * lipschitz / (2 * smallest) * trial.before**2)
    assert trial.newton == float((newton - one.goal).norm())
    assert (trial.after, trial.violates) == (float((following - one.goal).norm()), False)


def test_a_step_beyond_its_bound_would_be_seen() -> None:
    """With a tenth of the curvature's change claimed, Newton's step from a bad place is farther off than promised."""
    one = problem(1)
    start = climb(
        lambda error: attempt(one, OPTIONS["topk"], one.goal + error).ratio,
        0.01 * torch.ones(6, dtype=torch.float64), 60, torch.Generator().manual_seed(0),
    )  # fmt: skip
    trial = attempt(one, OPTIONS["topk"], one.goal + start)
    claimed = type(trial)(trial.before, trial.newton, trial.after, trial.newton_bound, trial.bound / 10, trial.printed)
    assert not trial.violates and claimed.violates


def test_climbing_never_goes_down() -> None:
    start = torch.ones(6, dtype=torch.float64)
    end = climb(lambda error: -float((error - 3).norm()), start, 200, torch.Generator().manual_seed(0))
    assert float((end - 3).norm()) < 0.3 * float((start - 3).norm())


def test_values() -> None:
    values = run().values
    for name in ("exact", "greedy.small", "topk.small", "greedy", "topk"):
        assert values[f"{name}.violations"] == 0
        assert 0 < values[f"{name}.median"] <= values[f"{name}.largest"] <= 1
        assert values[f"quadratic.{name}.worst"] < 1e-10
        assert values[f"{name}.order"] == pytest.approx(2, abs=0.3)
    assert values["exact.printed.largest"] < values["exact.largest"]
    assert values["rate.exact.after"] < 1e-12 < values["rate.kiht.after"]


def test_the_same_seeds_give_the_same_values() -> None:
    assert run().values == run().values
