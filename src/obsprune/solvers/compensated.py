"""Any solver, and the layer's bias takes what its output loses on average: the idea of elimination–compensation (arXiv
2602.20467), for one layer and for all removed weights together.

min over Z, b of ‖(W−Z) X − b 1ᵀ‖² has b = (W−Z) μ, μ the mean input; with that b put in, what is left for Z is the
layer problem with the centred Gram H − N μ μᵀ. So the inner solver gets that one, and knows of no bias.
Legend: W_RC dense weight, Z_RC sparse answer, D_RC = W − Z, m_C mean input μ, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.solvers.base import AnySolver, Solver, State


@dataclass(frozen=True)
class CentredState(State):
    """gram: the centred one; inner: the wrapped solver's own state; m_C the mean input."""

    inner: Any
    m_C: Tensor


@final
@dataclass(frozen=True)
class Compensated(Solver[CentredState]):
    """`inner` prunes what the inputs' mean does not explain; the bias takes the rest. For layers that have a bias."""

    inner: AnySolver

    @property
    def workspace(self) -> tuple[int, int]:  # type: ignore[override]  # as the inner one's, and its own
        squares, rectangles = self.inner.workspace
        return squares + 2, rectangles + 0

    def prepare(self, gram: Gram) -> CentredState:
        centred = gram.centred()
        inner = self.inner.prepare(centred)
        return CentredState(centred, inner.damping, inner, gram.mean_C)

    def search(self, W_RC: Tensor, state: CentredState, pattern: Pattern) -> tuple[Tensor, Tensor]:
        return self.inner.search(W_RC, state.inner, pattern)

    def shift(self, D_RC: Tensor, state: CentredState) -> Tensor:
        return D_RC @ state.m_C

    def without_bias(self) -> AnySolver:
        return self.inner
