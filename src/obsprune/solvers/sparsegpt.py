"""SparseGPT (Frantar & Alistarh, ICML 2023, Algorithm 1): Optimal Brain Surgeon column by column, one factor for all.

Legend: W_CR weight, a column of the layer in a row of memory; D_CR = W − Z, what is taken away; K_CC upper triangular
with H + λI = KKᵀ; E = DK, whose squares are the loss; B columns of a tile; k_B1 diagonal of K_BB; P_BR = Kᵀ D, what the
columns before the tile leave for it; V_BR what a weight would be if all after those decided stayed.

The loss is tr D (H + λI) Dᵀ = ‖DK‖², and column c of E depends on D up to c alone. A column that stays makes its own
term zero; one that goes has D_c = W_c and leaves E_c = k_c V_c, its score. Inside a tile D = E K_BB⁻¹ − K_BB⁻ᵀ P, so
V_c = W_c + (K_BB⁻ᵀ P)_c − Σ_{j<c} V_j G_jc over those that went, G = diag k · K_BB⁻¹: the published form, but with
inverses of tiles alone, where it takes that of the whole Gram.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.core.column_sweep import Choose, sweep, sweep_groups
from obsprune.core.linalg import dead_columns, factorise
from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.kernels import take
from obsprune.solvers.base import Solver, State, dead_first

PANEL = 4
"""Tiles, to which all columns before them are added in one matrix product."""


@dataclass(frozen=True)
class Factored(State):
    """K_CC upper triangular with H + λI = KKᵀ, k_C1 its diagonal; dead_C: inputs that were always zero, None where
    there are none.
    """

    K_CC: Tensor
    k_C1: Tensor
    dead_C: Tensor | None

    def inverse(self, tile: slice) -> Tensor:
        """K_BB⁻¹ of a tile."""
        K_BB = self.K_CC[tile, tile]
        eye_BB = torch.eye(len(K_BB), dtype=K_BB.dtype, device=K_BB.device)
        U_BB: Tensor = torch.linalg.solve_triangular(K_BB, eye_BB, upper=True)
        return U_BB

    def cost(self, tile: slice) -> Tensor:
        """k_B, but 0 for dead inputs."""
        k_B = self.k_C1[tile, 0]
        return k_B if self.dead_C is None else k_B.masked_fill(self.dead_C[tile], 0)

    def scores(self, V_BR: Tensor, columns: slice) -> Tensor:
        """The root of what it costs that a weight goes [R, B]."""
        scores_RB = (V_BR * self.k_C1[columns]).abs_().T
        return scores_RB if self.dead_C is None else dead_first(scores_RB, self.dead_C[columns])


@final
@dataclass(frozen=True)
class SparseGPT(Solver[Factored]):
    """damping: λ as a share of the mean diagonal. blocksize: columns per tile, whose mask is chosen on reaching it."""

    workspace = (3, 5)
    damping: float = 0.01
    blocksize: int = 128

    def prepare(self, gram: Gram) -> Factored:
        factor, dead_C = factorise(gram, self.damping), dead_columns(gram.H_CC)
        k_C1 = factor.K_CC.diagonal()[:, None].contiguous()
        return Factored(gram, factor.damping, factor.K_CC, k_C1, dead_C if bool(dead_C.any()) else None)

    def search(self, W_RC: Tensor, state: Factored, pattern: Pattern) -> tuple[Tensor, Tensor]:
        W_CR = W_RC.T.clone(memory_format=torch.contiguous_format)
        D_CR, keep_CR = torch.empty_like(W_CR), torch.empty_like(W_CR, dtype=torch.bool)
        group = pattern.group or 1  # none is cut
        width = max(self.blocksize // group, 1) * group
        for tile, P_BR in _tiles(state.K_CC, D_CR, width):
            U_BB = state.inverse(tile)
            V_BR = torch.addmm(W_CR[tile], U_BB.T, P_BR)
            keep_CR[tile] = _sweep(V_BR, U_BB * state.k_C1[tile], state, pattern, tile)
            torch.addcmul(W_CR[tile], V_BR, keep_CR[tile].to(V_BR.dtype), value=-1, out=D_CR[tile])
        return W_CR.sub_(D_CR).T.contiguous(), keep_CR.T.contiguous()


def _tiles(K_CC: Tensor, D_CR: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """The tiles from first to last, each with its P_BR, by what D_CR holds of the columns before it by then.

    Few columns are multiplied as fast as many, but for the time it takes to read D; so most of it is read for PANEL
    tiles at once.
    """
    columns = len(K_CC)
    for start in range(0, columns, PANEL * width):
        stop = min(start + PANEL * width, columns)
        P_PR = K_CC[:start, start:stop].T @ D_CR[:start]
        for first in range(start, stop, width):
            tile = slice(first, min(first + width, columns))
            P_BR = P_PR[first - start : tile.stop - start]
            yield tile, P_BR.addmm_(K_CC[start:first, tile].T, D_CR[start:first])


def _sweep(V_BR: Tensor, G_BB: Tensor, state: Factored, pattern: Pattern, tile: slice) -> Tensor:
    """Chooses keep_BR and brings V to its final values."""

    def choose(V_MR: Tensor, columns: slice) -> Tensor:
        within = slice(tile.start + columns.start, tile.start + columns.stop)
        rule = pattern.tile(V_MR.shape[1], within.start, within.stop)
        return rule.keep(state.scores(V_MR, within)).T

    if take(V_BR):
        return _launch(V_BR, G_BB, state, pattern, tile, choose)
    if pattern.group is not None:
        return sweep_groups(V_BR, G_BB, choose, pattern.group, pattern.pruned(1, pattern.group))
    keep_BR = choose(V_BR, slice(0, len(V_BR)))
    sweep(V_BR, G_BB, keep_BR)
    return keep_BR


def _launch(V_BR: Tensor, G_BB: Tensor, state: Factored, pattern: Pattern, tile: slice, choose: Choose) -> Tensor:
    """The same in one launch of a kernel; a pattern of groups keeps the best of each."""
    from obsprune.kernels import column_sweep as kernel  # imports Triton

    if pattern.group is not None:
        kept = pattern.group - pattern.pruned(1, pattern.group)
        return kernel.sweep_groups(V_BR, G_BB, state.cost(tile), kept, pattern.group)
    keep_BR = choose(V_BR, slice(0, len(V_BR)))
    kernel.sweep(V_BR, G_BB, keep_BR)
    return keep_BR
