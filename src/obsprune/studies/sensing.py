"""Sparse recovery (Wu et al., NeurIPS 2024, arXiv 2408.17163, section 4.1): y = Xθ* without noise, θ* sparse, find θ*.

The Hessian of ½‖y − Xθ‖² is XᵀX and its gradient Xᵀ(Xθ − y). The published curves take the gradient of the *mean*
squared error, 2/n of that, with the same Hessian: a `rate` of 2/n. With rate 1 gradient and Hessian belong together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from obsprune.core.iobs import k_iht, obs_iobs, stochastic_iobs, topk_iobs
from obsprune.report.figures import Figure, Pictures
from obsprune.studies.material import Material

ROUNDING = 1e-12
"""‖θ − θ*‖ / ‖θ*‖ at which a run has arrived: what is left is the rounding of float64."""
ROW = 6
"""Images in a row of the figure of digits."""

Rows = dict[str, list[Tensor]]


class Prior(ABC):
    """Where θ* comes from."""

    size: int

    @abstractmethod
    def goals(self, material: Material) -> Callable[[torch.Generator], Tensor]:
        """What draws one θ* [d], in float64. Raises InputError when data is missing."""

    @abstractmethod
    def survivors(self, goal: Tensor) -> int:
        """k, the non-zeros that the algorithms may use."""

    @abstractmethod
    def figures(self, panels: Mapping[str, Rows]) -> list[Figure]:
        """Points as images, where they are some: panels of rows, by title and name."""


@final
@dataclass(frozen=True)
class GaussianPrior(Prior):
    """16 values from N(0, 1) at random places of 128; k = 64."""

    size = 128
    nonzeros = 16

    def goals(self, material: Material) -> Callable[[torch.Generator], Tensor]:
        def draw(random: torch.Generator) -> Tensor:
            goal = torch.zeros(self.size, dtype=torch.float64)
            support = torch.randperm(self.size, generator=random)[: self.nonzeros]
            goal[support] = torch.randn(self.nonzeros, generator=random, dtype=torch.float64)
            return goal

        return draw

    def survivors(self, goal: Tensor) -> int:
        return 4 * self.nonzeros

    def figures(self, panels: Mapping[str, Rows]) -> list[Figure]:
        return []


@final
@dataclass(frozen=True)
class MnistPrior(Prior):
    """An image of MNIST's test set, grey values from 0 to 255; k twice the number of its pixels that are not 0."""

    size = 784

    def goals(self, material: Material) -> Callable[[torch.Generator], Tensor]:
        images, _ = material.mnist_test()

        def draw(random: torch.Generator) -> Tensor:
            return images[int(torch.randint(len(images), (), generator=random))].flatten().double()

        return draw

    def survivors(self, goal: Tensor) -> int:
        return min(2 * int((goal != 0).sum()), self.size)

    def figures(self, panels: Mapping[str, Rows]) -> list[Figure]:
        pictures = [
            Pictures(title, {name: [image(point) for point in points[:ROW]] for name, points in rows.items()})
            for title, rows in panels.items()
        ]
        return [Figure("digits", pictures)]


def image(point: Tensor) -> Tensor:
    """A vector as an image of MNIST, what is outside 0…255 cut off."""
    return point.view(28, 28).clamp(0, 255)


PRIORS: dict[str, Prior] = {"gaussian": GaussianPrior(), "mnist": MnistPrior()}


@dataclass(frozen=True)
class Problem:
    """Find `goal` [d] from target = X·goal, X [n, d] being `sensing`, with k `survivors`, from `start`.

    hessian: XᵀX; its inverse and its largest eigenvalue (smoothness) are made once for all steps; moment: Xᵀ·target.
    """

    sensing: Tensor
    goal: Tensor
    start: Tensor
    survivors: int
    target: Tensor
    moment: Tensor
    hessian: Tensor
    inverse: Tensor
    smoothness: float

    @classmethod
    def make(cls, sensing: Tensor, goal: Tensor, start: Tensor, survivors: int) -> Problem:
        """With all that follows from these four."""
        target, hessian = sensing @ goal, sensing.T @ sensing
        inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        largest = float(torch.linalg.eigvalsh(hessian)[-1])
        return cls(sensing, goal, start, survivors, target, sensing.T @ target, hessian, inverse, largest)

    def gradient(self, point: Tensor) -> Tensor:
        """Xᵀ(Xθ − y), through the Hessian: d·d products instead of 2·n·d."""
        return self.hessian @ point - self.moment

    def loss(self, point: Tensor) -> float:
        """The mean squared error, from its residual."""
        return float((self.target - self.sensing @ point).square().mean())

    def distance(self, point: Tensor) -> float:
        return float((point - self.goal).norm())


def draw_problem(draw: Callable[[torch.Generator], Tensor], prior: Prior, random: torch.Generator) -> Problem:
    """2d sensing vectors from N(0, 1/n), the start from U(−1/√d, 1/√d)."""
    goal, size = draw(random), prior.size
    sensing = torch.randn(2 * size, size, generator=random, dtype=torch.float64) / (2 * size) ** 0.5
    start = (2 * torch.rand(size, generator=random, dtype=torch.float64) - 1) / size**0.5
    return Problem.make(sensing, goal, start, prior.survivors(goal))


class Algorithm(ABC):
    """One step from a point to the next. title: what figures and tables call it."""

    title: str

    @abstractmethod
    def step(self, problem: Problem, point: Tensor, random: torch.Generator) -> Tensor:
        """The next point, of k non-zeros."""


@final
@dataclass(frozen=True)
class Iht(Algorithm):
    """k-IHT with the step 1/λ_max(XᵀX)."""

    title = "k-IHT"

    rate: float

    def step(self, problem: Problem, point: Tensor, random: torch.Generator) -> Tensor:
        return k_iht(point, problem.gradient(point), self.rate / problem.smoothness, problem.survivors)


@final
@dataclass(frozen=True)
class Iobs(Algorithm):
    """I-OBS with exact curvature; rule: one of its two options in core/iobs.py."""

    title: str
    rule: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    rate: float

    def step(self, problem: Problem, point: Tensor, random: torch.Generator) -> Tensor:
        return self.rule(point, self.rate * problem.gradient(point), problem.inverse, problem.survivors)


@final
@dataclass(frozen=True)
class Stochastic(Algorithm):
    """Stochastic I-OBS. Its gradient estimates Xᵀ(Xθ − y) from `batch` of the n rows: (n/batch)·X_Bᵀ(X_Bθ − y_B)."""

    damping: float
    batch: int

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"λ = {self.damping:g}"

    def step(self, problem: Problem, point: Tensor, random: torch.Generator) -> Tensor:
        rows = torch.randperm(len(problem.sensing), generator=random)[: self.batch]
        sensing = problem.sensing[rows]
        gradient = sensing.T @ (sensing @ point - problem.target[rows]) * (len(problem.sensing) / self.batch)
        return stochastic_iobs(point, gradient, self.damping, problem.survivors)


KINDS: dict[str, Callable[[float], Algorithm]] = {
    "topk": partial(Iobs, "Topk-I-OBS", topk_iobs),
    "kiht": Iht,
    "obs": partial(Iobs, "Option 2", obs_iobs),  # with the greedy support
}


@dataclass(frozen=True)
class Run:
    """An algorithm, its steps, and the figure whose curve it is."""

    figure: str
    algorithm: Algorithm
    steps: int


@dataclass(frozen=True)
class Trace:
    """One run. distances: ‖θ − θ*‖ after 0, 1, … steps; losses: after those steps where one was asked for; points:
    after those that are shown; found: the share of θ*'s non-zeros that are none at the end.
    """

    distances: list[float]
    losses: dict[int, float]
    points: dict[int, Tensor]
    found: float

    def steps_to(self, share: float) -> int | None:
        """Steps until the distance is this share of the first one; None where it never is."""
        return next((done for done, now in enumerate(self.distances) if now <= share * self.distances[0]), None)


def follow(problem: Problem, run: Run, losses_at: set[int], shown: set[int], random: torch.Generator) -> Trace:
    """The run's steps from the problem's start; once only rounding is left the point stays where it is."""
    point, least = problem.start, ROUNDING * float(problem.goal.norm())
    distances, losses, points = [problem.distance(point)], {0: problem.loss(point)}, {}
    for done in range(1, run.steps + 1):
        if distances[-1] > least:
            point = run.algorithm.step(problem, point, random)
        distances.append(problem.distance(point))
        if done in losses_at:
            losses[done] = problem.loss(point)
        if done in shown:
            points[done] = point
    return Trace(distances, losses, points, float((point[problem.goal != 0] != 0).double().mean()))
