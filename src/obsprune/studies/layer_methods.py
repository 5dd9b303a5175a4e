"""Methods for one layer that are no solvers of the package, as solvers of a study; and what is timed of each.

Every one minimises tr (W−Z) A (W−Z)ᵀ, A = H + λI, over sparse Z. Legend: W_RC dense weight, Z_RC sparse weight, A_CC
damped Gram, U_CC upper triangular with A⁻¹ = UᵀU, N_CC = A/(s sᵀ) with s_C = √diag A; keep_RC True = survives.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from obsprune.core.cbs import Search
from obsprune.core.fisher import Fisher, Layout
from obsprune.core.iobs import natural_direction
from obsprune.core.linalg import damped, dead_columns, exact_refit, factorise, layer_loss
from obsprune.core.patterns import Pattern, PerRow, Unstructured
from obsprune.core.statistics import Gram
from obsprune.errors import InputError
from obsprune.solvers import build
from obsprune.solvers.base import AnySolver, Solver, State, dead_first
from obsprune.solvers.obc import OBC


@dataclass(frozen=True)
class Damped(State):
    """A_CC = H + λI."""

    A_CC: Tensor


@dataclass(frozen=True)
class Factored(Damped):
    """U_CC with A⁻¹ = UᵀU; inner: the state of the solver that projects."""

    U_CC: Tensor
    inner: Any = None


@final
@dataclass(frozen=True)
class IteratedSurgeon(Solver[Factored]):
    """I-OBS (Wu et al. 2024, Algorithm 1) on the layer's own loss, whose gradient at Z is (Z − W) A: from what `inner`
    makes of W, rounds of Z − η g A⁻¹ and again `inner`, the mask free. Of all rounds with all steps η, and one shot,
    the best is kept. With η = 1 every round begins at W, up to rounding, and gives one shot again.
    """

    workspace = (6, 6)
    inner: AnySolver
    steps: Sequence[float] = (0.1, 0.3, 0.6)
    rounds: int = 10
    damping: float = 0.01

    def prepare(self, gram: Gram) -> Factored:
        factor = factorise(gram, self.damping)
        A_CC = damped(gram.H_CC, factor.damping)
        return Factored(gram, factor.damping, A_CC, factor.U_CC, self.inner.prepare(gram))

    def search(self, W_RC: Tensor, state: Factored, pattern: Pattern) -> tuple[Tensor, Tensor]:
        return min(self._iterates(W_RC, state, pattern), key=lambda found: layer_loss(W_RC - found[0], state.H_CC))

    def _iterates(self, W_RC: Tensor, state: Factored, pattern: Pattern) -> Iterator[tuple[Tensor, Tensor]]:
        first = self._projected(W_RC, state, pattern)
        yield first
        for step in self.steps:
            Z_RC, _ = first
            for _ in range(self.rounds):
                point_RC = Z_RC - step * natural_direction((Z_RC - W_RC) @ state.A_CC, state.U_CC)
                Z_RC, keep_RC = self._projected(point_RC, state, pattern)
                yield Z_RC, keep_RC

    def _projected(self, point_RC: Tensor, state: Factored, pattern: Pattern) -> tuple[Tensor, Tensor]:
        Z_RC, keep_RC = self.inner.search(point_RC, state.inner, pattern)
        return Z_RC.where(keep_RC, 0), keep_RC


@final
@dataclass(frozen=True)
class HardThresholding(Solver[Damped]):
    """k-IHT, what I-OBS sets out from, where it does best: in the scale in which N has a unit diagonal. Rounds of
    Z − (Z − W) N / λ_max(N), of which the pattern keeps the largest; the loss never rises.
    """

    workspace = (3, 4)
    rounds: int = 100
    damping: float = 0.01

    def prepare(self, gram: Gram) -> Damped:
        return Damped(gram, self.damping, damped(gram.H_CC, self.damping))

    def search(self, W_RC: Tensor, state: Damped, pattern: Pattern) -> tuple[Tensor, Tensor]:
        s_C, dead_C = state.A_CC.diagonal().sqrt(), dead_columns(state.H_CC)
        N_CC, goal_RC = state.A_CC / s_C / s_C[:, None], W_RC * s_C
        step_CC = N_CC / torch.linalg.eigvalsh(N_CC)[-1]
        keep_RC = pattern.keep(dead_first(goal_RC.abs(), dead_C))
        Z_RC = goal_RC.where(keep_RC, 0)
        for _ in range(self.rounds):
            point_RC = Z_RC - (Z_RC - goal_RC) @ step_CC
            keep_RC = pattern.keep(dead_first(point_RC.abs(), dead_C))
            Z_RC = point_RC.where(keep_RC, 0)
        return Z_RC / s_C, keep_RC


@final
@dataclass(frozen=True)
class CombinatorialSurgery(Solver[Factored]):
    """CBS (Yu et al. 2022) with A for the Fisher matrix, a block for each row: swaps from magnitude's set (CBS-S), then
    the survivors' joint minimum (CBS-U), which on a layer is the exact refit. It swaps weights of all rows, so that it
    knows no pattern but a share of the whole. The root of A is held once for each row.
    """

    workspace = (6, 6)
    swaps: Search = field(default_factory=Search)
    damping: float = 0.01

    def prepare(self, gram: Gram) -> Factored:
        factor = factorise(gram, self.damping)
        return Factored(gram, factor.damping, damped(gram.H_CC, factor.damping), factor.U_CC)

    def search(self, W_RC: Tensor, state: Factored, pattern: Pattern) -> tuple[Tensor, Tensor]:
        rows, columns = W_RC.shape
        eye_CC = torch.eye(columns, dtype=W_RC.dtype, device=W_RC.device)
        S_CC = torch.linalg.solve_triangular(state.U_CC.T, eye_CC, upper=False)  # SᵀS = A
        fisher = Fisher(S_CC.repeat(1, rows), 0.0, Layout([W_RC.numel()], columns))
        start_RC = pattern.keep(dead_first(W_RC.abs(), dead_columns(state.H_CC)))
        keep_RC = self.swaps.improve(fisher, W_RC.flatten(), start_RC.flatten()).view_as(W_RC)
        if not torch.equal(pattern.keep(keep_RC.to(W_RC.dtype)), keep_RC):
            raise InputError("CBS removes weights wherever they are, and this pattern does not let it")
        return exact_refit(W_RC, state.A_CC, keep_RC), keep_RC


@dataclass(frozen=True)
class Answer:
    """A sparse weight, and the processor's seconds it took, those of all threads together."""

    weight: Tensor
    seconds: float


@dataclass(frozen=True)
class Method(ABC):
    """How a matrix is pruned. share: the pattern that a sparsity means; grouped: whether it takes n:m, too."""

    solver: AnySolver
    share: Callable[[float], Pattern] = Unstructured
    grouped: bool = True

    @abstractmethod
    def answers(self, W_RC: Tensor, gram: Gram, patterns: Sequence[Pattern]) -> list[Answer]:
        """To each pattern, all of one kind. The time is that of a run for this pattern alone."""


@final
@dataclass(frozen=True)
class Solved(Method):
    """Each pattern by itself."""

    def answers(self, W_RC: Tensor, gram: Gram, patterns: Sequence[Pattern]) -> list[Answer]:
        return [self._answer(W_RC, gram, pattern) for pattern in patterns]

    def _answer(self, W_RC: Tensor, gram: Gram, pattern: Pattern) -> Answer:
        start = time.process_time()
        weight = self.solver.solve(W_RC, self.solver.prepare(gram), pattern).weight
        return Answer(weight, time.process_time() - start)


@final
@dataclass(frozen=True)
class Swept(Method):
    """ExactOBS: what its sweep says of every weight serves all patterns (Frantar & Alistarh 2022, section 4)."""

    solver: OBC

    def answers(self, W_RC: Tensor, gram: Gram, patterns: Sequence[Pattern]) -> list[Answer]:
        start = time.process_time()
        state = self.solver.prepare(gram)
        worth_RC = self.solver.worth(W_RC, state, patterns[0])
        swept, found = time.process_time() - start, list[Answer]()
        for pattern in patterns:
            start = time.process_time()
            Z_RC = exact_refit(W_RC, state.A_CC, pattern.keep(worth_RC))
            found.append(Answer(Z_RC, swept + time.process_time() - start))
        return found


METHODS: dict[str, Method] = {
    "magnitude": Solved(build("magnitude", {})),
    "magnitude-exact": Solved(build("magnitude", {"exact": True})),
    "wanda": Solved(build("wanda", {}), PerRow),
    "kiht": Solved(HardThresholding()),
    "sparsegpt": Solved(build("sparsegpt", {})),
    "sparsegpt-refit": Solved(build("sparsegpt", {"refit": 10})),
    "iobs": Solved(IteratedSurgeon(build("sparsegpt", {}))),
    "cbs": Solved(CombinatorialSurgery(), grouped=False),
    "admm": Solved(build("admm", {})),
    "obc": Swept(OBC()),
}
