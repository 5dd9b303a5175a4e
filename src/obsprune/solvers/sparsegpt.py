"""SparseGPT (Frantar & Alistarh, ICML 2023, Algorithm 1): Optimal Brain Surgeon column by column, one factor for all.

Legend: W_CR weight, a column of the layer in a row of memory; D_CR = W − Z, what is taken away; K_CC upper triangular
with H + λI = KKᵀ; P_CR what the columns before c leave for column c, Σ_{j<c} K_jc D_j; B columns of a part.

The loss is tr D (H + λI) Dᵀ = ‖DK‖², and column c of DK is D_c K_cc + P_c: it depends on D up to c alone. So a column
that stays makes its own term zero, by D_c = −P_c / K_cc, and one that goes has D_c = W_c, and the term that is its
score. The published form spreads errors over the columns to the right by the factor of the inverse: the same numbers,
but for that factor, which takes three times the work of K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.core.linalg import dead_columns, factorise
from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.solvers.base import Solver, State, dead_first

PART = 32
"""Columns of a part of a tile, to which all columns before it add in one matrix product."""


@dataclass(frozen=True)
class Factored(State):
    """K_CC upper triangular with H + λI = KKᵀ; dead_C: inputs that were always zero."""

    K_CC: Tensor
    dead_C: Tensor


@final
@dataclass(frozen=True)
class SparseGPT(Solver[Factored]):
    """damping: λ as a share of the mean diagonal. blocksize: columns per tile, whose mask is chosen on reaching it."""

    workspace = (4, 6)
    damping: float = 0.01
    blocksize: int = 128

    def prepare(self, gram: Gram) -> Factored:
        factor = factorise(gram, self.damping)
        return Factored(gram, factor.damping, factor.K_CC, dead_columns(gram.H_CC))

    def search(self, W_RC: Tensor, state: Factored, pattern: Pattern) -> tuple[Tensor, Tensor]:
        W_CR = W_RC.T.contiguous()
        tile, part = (self._width(most, pattern) for most in (self.blocksize, min(PART, self.blocksize)))
        sweep = _Sweep.of(W_CR, state, pattern, pattern.group or tile)
        sweep(0, len(W_CR), sorted({tile, part, 1}, reverse=True))
        return (W_CR - sweep.D_CR).T.contiguous(), sweep.keep_CR.T.contiguous()

    def _width(self, most: int, pattern: Pattern) -> int:
        """So many columns that no group of the pattern is cut."""
        group = pattern.group or 1
        return max(most // group, 1) * group


@final
@dataclass(frozen=True)
class _Sweep:
    """One matrix from the first column to the last: D_CR and keep_CR are filled, P_CR as far as columns are reached.

    share_CR: −1 / K_cc where a weight stays, 0 where it goes; judged: columns whose mask is chosen together.
    """

    W_CR: Tensor
    D_CR: Tensor
    P_CR: Tensor
    share_CR: Tensor
    keep_CR: Tensor
    state: Factored
    pattern: Pattern
    judged: int

    @classmethod
    def of(cls, W_CR: Tensor, state: Factored, pattern: Pattern, judged: int) -> _Sweep:
        keep_CR, D_CR, share_CR = torch.empty_like(W_CR, dtype=torch.bool), *map(torch.empty_like, (W_CR, W_CR))
        return cls(W_CR, D_CR, torch.zeros_like(W_CR), share_CR, keep_CR, state, pattern, judged)

    def __call__(self, start: int, stop: int, widths: list[int]) -> None:
        """Columns start…stop, whose P knows of all columns before `start`, in parts of the first of `widths`.

        A part is told of the columns since `start` when it is reached, and goes on in finer parts by itself: sums as in
        one step a column, but nearly all in matrix products.
        """
        width, *finer = widths
        for first in range(start, stop, width):
            if not finer and first % self.judged == 0:
                self._judge(start, first, min(first + self.judged, len(self.W_CR)))
            last = min(first + width, stop)
            if first > start:
                self.P_CR[first:last].addmm_(*self._left(start, first, last))
            if finer:
                self(first, last, finer)
            else:
                self.D_CR[first].addcmul_(self.P_CR[first], self.share_CR[first])

    def _left(self, start: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Kᵀ and D, whose product is what the columns start…first leave for the columns first…last."""
        return self.state.K_CC[start:first, first:last].T, self.D_CR[start:first]

    def _judge(self, start: int, first: int, last: int) -> None:
        """Chooses the mask of columns first…last by their terms in the loss if all of them before a column stay."""
        K_BB = self.state.K_CC[first:last, first:last]
        P_BR = torch.addmm(self.P_CR[first:last], *self._left(start, first, last))
        moved_BR = torch.linalg.solve_triangular(K_BB.T, P_BR, upper=False)
        terms_BR = (self.W_CR[first:last] + moved_BR) * K_BB.diagonal()[:, None]
        scores_RB = dead_first(terms_BR.square().T, self.state.dead_C[first:last])
        keep_BR = self.pattern.tile(self.W_CR.shape[1], first, last).keep(scores_RB).T
        self.keep_CR[first:last] = keep_BR
        torch.mul(self.W_CR[first:last], ~keep_BR, out=self.D_CR[first:last])
        torch.div(keep_BR, -K_BB.diagonal()[:, None], out=self.share_CR[first:last])
