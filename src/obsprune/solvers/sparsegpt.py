"""SparseGPT (Frantar & Alistarh, ICML 2023, Algorithm 1): Optimal Brain Surgeon column by column, one inverse for all.

Legend: W_RC weight, updated in place; U_CC upper triangular with (H + λI)⁻¹ = UᵀU; e_R the error of one column divided
by U_cc, spread over the columns to its right; E_RB the errors of a tile of B columns.
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


@dataclass(frozen=True)
class Factored(State):
    """U_CC upper triangular with (H + λI)⁻¹ = UᵀU; dead_C: inputs that were always zero."""

    U_CC: Tensor
    dead_C: Tensor


@final
@dataclass(frozen=True)
class SparseGPT(Solver[Factored]):
    """damping: λ as a share of the mean diagonal. blocksize: columns per tile, whose mask is chosen on reaching it."""

    workspace = (4, 4)
    damping: float = 0.01
    blocksize: int = 128

    def prepare(self, gram: Gram) -> Factored:
        factor = factorise(gram, self.damping)
        return Factored(gram, factor.damping, factor.U_CC, dead_columns(gram.H_CC))

    def search(self, W_RC: Tensor, state: Factored, pattern: Pattern) -> tuple[Tensor, Tensor]:
        W_RC = W_RC.clone()
        keep_RC = torch.ones_like(W_RC, dtype=torch.bool)
        for start, stop in self._tiles(W_RC.shape[1], pattern):
            E_RB = self._sweep(W_RC, keep_RC, state, pattern, start, stop)
            W_RC[:, stop:].addmm_(E_RB, state.U_CC[start:stop, stop:], alpha=-1)
        return W_RC, keep_RC

    def _tiles(self, columns: int, pattern: Pattern) -> list[tuple[int, int]]:
        """Tiles of `blocksize` columns, rounded so that no group of the pattern is cut."""
        group = pattern.group or 1
        width = max(self.blocksize // group, 1) * group
        return [(start, min(start + width, columns)) for start in range(0, columns, width)]

    def _sweep(self, W_RC: Tensor, keep_RC: Tensor, state: Factored, pattern: Pattern, start: int, stop: int) -> Tensor:
        """Prunes columns start…stop in place; returns their errors E_RB, still to be absorbed by the columns beyond."""
        U_BB = state.U_CC[start:stop, start:stop]
        W_RB, keep_RB = W_RC[:, start:stop], keep_RC[:, start:stop]
        E_RB = torch.zeros_like(W_RB)
        group = pattern.group or stop - start
        for column in range(stop - start):
            if column % group == 0:  # the mask of the next columns is chosen on the weights as they are now
                a, b = column, column + group
                scores = dead_first((W_RB[:, a:b] / U_BB.diagonal()[a:b]).square(), state.dead_C[start + a : start + b])
                keep_RB[:, a:b] = pattern.tile(len(W_RC), start + a, start + b).keep(scores)
            e_R = W_RB[:, column].masked_fill(keep_RB[:, column], 0) / U_BB[column, column]
            W_RB[:, column + 1 :].addr_(e_R, U_BB[column, column + 1 :], alpha=-1)
            E_RB[:, column] = e_R
        return E_RB
