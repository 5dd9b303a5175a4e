"""Any solver, then its mask kept and the surviving weights refitted, by conjugate gradients or exactly (algorithms:
section 6).

Legend: W_RC dense weight, Z_RC sparse answer, A_CC damped Gram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from obsprune.core.linalg import damped, exact_refit, refit
from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.solvers.base import AnySolver, Solver, State


@dataclass(frozen=True)
class RefitState(State):
    """inner: the wrapped solver's own state; A_CC = H + λI, what the refit minimises over."""

    inner: Any
    A_CC: Tensor


@final
@dataclass(frozen=True)
class Refitted(Solver[RefitState]):
    """`inner` chooses the mask; `steps` masked PCG steps move the rest. λ is the larger of `inner`'s and `floor`."""

    inner: AnySolver
    steps: int = 10
    floor: float = 0.01

    @property
    def workspace(self) -> tuple[int, int]:  # type: ignore[override]  # as the inner one's, and its own
        squares, rectangles = self.inner.workspace
        return squares + 1, rectangles + 3

    def prepare(self, gram: Gram) -> RefitState:
        inner = self.inner.prepare(gram)
        damping = max(inner.damping, self.floor)
        return RefitState(gram, damping, inner, damped(gram.H_CC, damping))

    def search(self, W_RC: Tensor, state: RefitState, pattern: Pattern) -> tuple[Tensor, Tensor]:
        Z_RC, keep_RC = self.inner.search(W_RC, state.inner, pattern)
        return refit(W_RC, Z_RC.where(keep_RC, 0), state.A_CC, keep_RC, self.steps), keep_RC


@final
@dataclass(frozen=True)
class ExactlyRefitted(Solver[RefitState]):
    """As Refitted, but to the very minimum on the mask: a Cholesky factorisation a row, R·C³/3 flops."""

    inner: AnySolver
    floor: float = 0.01

    @property
    def workspace(self) -> tuple[int, int]:  # type: ignore[override]  # as the inner one's, and its own
        squares, rectangles = self.inner.workspace
        return squares + 2, rectangles + 3

    def prepare(self, gram: Gram) -> RefitState:
        return Refitted(self.inner, 0, self.floor).prepare(gram)

    def search(self, W_RC: Tensor, state: RefitState, pattern: Pattern) -> tuple[Tensor, Tensor]:
        keep_RC = self.inner.search(W_RC, state.inner, pattern)[1]
        return exact_refit(W_RC, state.A_CC, keep_RC), keep_RC
