"""The convergence bounds of I-OBS (Wu et al., NeurIPS 2024, arXiv 2408.17163) against what its steps do.

For f with μ ≤ ∇²f ≤ L and an M-Lipschitz Hessian, θ* its k*-sparse minimiser, e = θ − θ* and v = θ⁺ − θ* the error of
the Newton point, ‖v‖ ≤ M/2μ ‖e‖², and the projection onto k entries multiplies it by at most

    Topk:      1 + √(k*/k)
    Option 2:  1 + √(L/μ · (d−k)/(d−k*))     with the best support

The text at hand prints the last ratio as (d−k*)/(d−k): above 1, so weaker than 1 + √(L/μ), which holds because θ*
itself is among the candidates, and growing when more entries are kept. Averaging the cost over all supports that
contain θ*'s gives the ratio above.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.core.iobs import best_support, greedy_support, newton_point, obs_project, top_k

STEEPEST = math.atanh(1 / math.sqrt(3))
"""Where the derivative of sech² is largest: |d sech²(z)/dz| = 2 sech²(z)|tanh z| ≤ 4/(3√3)."""
REACH = (1e-3, 30.0)
"""Distances of the starting points, smallest and largest."""
ROUNDING = 1e-12
"""What an error may exceed its bound by; θ* is of the size of 1, in float64."""
NEAR = 0.1
"""Distances below it show the order of convergence."""
FACTS = {
    "problems": "sum of (x'e)^2/2 + c (log cosh(x'e + s) - tanh(s) x'e), X Gaussian (even seeds) or the identity (odd)"
}


@dataclass(frozen=True)
class Shape:
    """d, k* and k."""

    size: int
    nonzeros: int
    survivors: int


@dataclass(frozen=True)
class Problem:
    """The loss f(θ) = Σ φᵢ(xᵢᵀ(θ − θ*)), φᵢ′(u) = u + c·(tanh(u + sᵢ) − tanh sᵢ): minimal at θ*, its Hessian changing.

    sensing: X [n, d]; goal: θ* [d]; shift: s [n]; bump: c ≥ 0, and 0 makes f quadratic.
    """

    sensing: Tensor
    goal: Tensor
    shift: Tensor
    bump: float
    shape: Shape

    def gradient(self, point: Tensor) -> Tensor:
        """[d]."""
        u = self.sensing @ (point - self.goal)
        return self.sensing.T @ (u + self.bump * (torch.tanh(u + self.shift) - torch.tanh(self.shift)))

    def hessian(self, point: Tensor) -> Tensor:
        """Xᵀ diag(φ″) X with φ″ = 1 + c·sech²(u + s): [d, d]."""
        u = self.sensing @ (point - self.goal)
        curvature = 1 + self.bump / torch.cosh(u + self.shift).square()
        return self.sensing.T @ (curvature[:, None] * self.sensing)

    @property
    def constants(self) -> tuple[float, float, float]:
        """(μ, L, M), true everywhere.

        1 ≤ φ″ ≤ 1 + c, so μ = λ_min(XᵀX) and L = (1 + c)·λ_max(XᵀX) bound every Hessian. φ″ changes by at most
        c·4/(3√3)·|xᵢᵀδ| ≤ c·4/(3√3)·‖xᵢ‖·‖δ‖ when θ moves by δ, and ‖Xᵀ diag(a) X‖ ≤ max|aᵢ|·λ_max(XᵀX), so
        M = c·4/(3√3)·max‖xᵢ‖·λ_max(XᵀX). With X = I nothing is lost: one entry moves, at its steepest.
        """
        eigenvalues = torch.linalg.eigvalsh(self.sensing.T @ self.sensing)
        smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
        steepest = self.bump * 4 / (3 * math.sqrt(3)) * float(self.sensing.norm(dim=1).max())
        return smallest, (1 + self.bump) * largest, steepest * largest


SENSING: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "X Gaussian": lambda d, random: torch.randn(2 * d, d, generator=random, dtype=torch.float64) / (2 * d) ** 0.5,
    "X = I": lambda d, random: torch.eye(d, dtype=torch.float64),
}
"""Two kinds of problem, taken in turn: of ordinary condition, and one where μ, L and M are as sharp as can be."""


def kind_of(seed: int) -> str:
    """Which of SENSING a seed draws."""
    return list(SENSING)[seed % len(SENSING)]


def draw_problem(shape: Shape, seed: int, random: torch.Generator) -> Problem:
    """The seed's kind of X; θ* of N(0, 1) values; every sᵢ at one of the two steepest places; c from 0.1 to 10."""
    sensing = SENSING[kind_of(seed)](shape.size, random)
    goal = torch.zeros(shape.size, dtype=torch.float64)
    support = torch.randperm(shape.size, generator=random)[: shape.nonzeros]
    goal[support] = torch.randn(shape.nonzeros, generator=random, dtype=torch.float64)
    shift = STEEPEST * (2.0 * torch.randint(2, (len(sensing),), generator=random) - 1).double()
    return Problem(sensing, goal, shift, 10 ** (2 * float(torch.rand((), generator=random)) - 1), shape)


class Option(ABC):
    """A way to make the Newton point sparse, and how much farther from θ* it may come to lie by that."""

    @abstractmethod
    def project(self, point: Tensor, inverse: Tensor, survivors: int) -> Tensor:
        """The sparse point."""

    @abstractmethod
    def factor(self, condition: float, shape: Shape) -> float:
        """The bound's first factor; condition: L/μ."""


@final
@dataclass(frozen=True)
class Topk(Option):
    """Option 1."""

    def project(self, point: Tensor, inverse: Tensor, survivors: int) -> Tensor:
        return top_k(point, survivors)

    def factor(self, condition: float, shape: Shape) -> float:
        return 1 + math.sqrt(shape.nonzeros / shape.survivors)


@final
@dataclass(frozen=True)
class Obs(Option):
    """Option 2; support: chooses the mask."""

    support: Callable[[Tensor, Tensor, int], Tensor]

    def project(self, point: Tensor, inverse: Tensor, survivors: int) -> Tensor:
        return obs_project(point, inverse, self.support(point, inverse, survivors))

    def factor(self, condition: float, shape: Shape) -> float:
        return 1 + math.sqrt(condition * (shape.size - shape.survivors) / (shape.size - shape.nonzeros))


def printed_factor(condition: float, shape: Shape) -> float:
    """Option 2's as printed, the ratio upside down."""
    return 1 + math.sqrt(condition * (shape.size - shape.nonzeros) / (shape.size - shape.survivors))


OPTIONS: dict[str, Option] = {"exact": Obs(best_support), "greedy": Obs(greedy_support), "topk": Topk()}


@dataclass(frozen=True)
class Trial:
    """One step: ‖e‖ before it, ‖v‖ at the Newton point and ‖e‖ after it, with the bounds of the last two."""

    before: float
    newton: float
    after: float
    newton_bound: float
    bound: float
    printed: float

    @property
    def ratio(self) -> float:
        """Observed/bound."""
        return self.after / self.bound

    @property
    def violates(self) -> bool:
        return self.after > self.bound + ROUNDING

    @property
    def unpromised(self) -> bool:
        """It came closer, and the bound did not say so."""
        return self.after < self.before <= self.bound


def step(problem: Problem, option: Option, point: Tensor) -> tuple[Tensor, Tensor]:
    """The Newton point, and it made sparse."""
    inverse = torch.linalg.inv(problem.hessian(point))
    newton = newton_point(point, problem.gradient(point), inverse)
    return newton, option.project(newton, inverse, problem.shape.survivors)


def attempt(problem: Problem, option: Option, point: Tensor) -> Trial:
    """One step from there, beside its bounds."""
    smallest, largest, lipschitz = problem.constants
    newton, following = step(problem, option, point)
    before, at_newton, after = (float((one - problem.goal).norm()) for one in (point, newton, following))
    newton_bound, condition = lipschitz / (2 * smallest) * before**2, largest / smallest
    bound = option.factor(condition, problem.shape) * newton_bound
    return Trial(before, at_newton, after, newton_bound, bound, printed_factor(condition, problem.shape) * newton_bound)


def starts(problem: Problem, count: int, random: torch.Generator) -> list[Tensor]:
    """Points around θ* in random directions, at distances from the least to the largest of REACH; every second sparse
    as the iterates are.
    """
    points = []
    for index in range(count):
        radius = REACH[0] * (REACH[1] / REACH[0]) ** (index / max(1, count - 1))
        direction = torch.randn(problem.shape.size, generator=random, dtype=torch.float64)
        if index % 2:
            direction = torch.where(problem.goal != 0, direction, top_k(direction, problem.shape.survivors))
        points.append(problem.goal + radius * direction / direction.norm())
    return points


def climb(score: Callable[[Tensor], float], error: Tensor, steps: int, random: torch.Generator) -> Tensor:
    """Random hill climbing over e: changes from its own size down to a thousandth of it, of all entries or of few."""
    best = score(error)
    for _ in range(steps):
        length, share = torch.rand(2, generator=random, dtype=torch.float64)
        changed = torch.rand(len(error), generator=random) < share**2
        change = torch.randn(len(error), generator=random, dtype=torch.float64).where(changed, 0)
        trial = error + float(error.norm()) * 10 ** (-3 * length) * change
        if (found := score(trial)) > best:
            error, best = trial, found
    return error


def projection_ratio(problem: Problem, option: Option, error: Tensor) -> float:
    """‖P(θ* + v) − θ*‖ over its bound, factor·‖v‖, under the Hessian at θ* and its own condition."""
    hessian = problem.hessian(problem.goal)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    projected = option.project(problem.goal + error, torch.linalg.inv(hessian), problem.shape.survivors)
    factor = option.factor(float(eigenvalues[-1] / eigenvalues[0]), problem.shape)
    return float((projected - problem.goal).norm() / (factor * error.norm()))
