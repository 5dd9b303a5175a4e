"""ExactOBS (Frantar & Alistarh, Optimal Brain Compression, NeurIPS 2022): one weight after the other, row by row.

Each row is swept once, down to nothing; the losses along the way say what every weight is worth, so that one sweep
serves all sparsities and a budget over all rows. The weights left are then exactly refitted.
Legend: W_BC a batch of rows; G_BCC each row's own inverse of the damped Gram over its survivors; keep_BC True =
survives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.core.linalg import BATCH_BYTES, damped, dead_columns, exact_refit, factorise
from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.solvers.base import Solver, State, dead_first


@dataclass(frozen=True)
class Inverted(State):
    """A_CC = H + λI; inverse_CC = A⁻¹ in float64; dead_C: inputs that were always zero."""

    A_CC: Tensor
    inverse_CC: Tensor
    dead_C: Tensor


@final
@dataclass(frozen=True)
class OBC(Solver[Inverted]):
    """damping: λ as a share of the mean diagonal. The sweep runs in float64: C eliminations use up float32."""

    workspace = (6, 4)
    damping: float = 0.01

    def prepare(self, gram: Gram) -> Inverted:
        factor = factorise(gram.double(), self.damping)
        inverse_CC = factor.U_CC.T @ factor.U_CC
        A_CC = damped(gram.H_CC, factor.damping)
        return Inverted(gram, factor.damping, A_CC, inverse_CC, dead_columns(gram.H_CC))

    def search(self, W_RC: Tensor, state: Inverted, pattern: Pattern) -> tuple[Tensor, Tensor]:
        keep_RC = pattern.keep(self.worth(W_RC, state, pattern))
        return exact_refit(W_RC, state.A_CC, keep_RC), keep_RC

    def worth(self, W_RC: Tensor, state: Inverted, pattern: Pattern) -> Tensor:
        """What the sweep says of every weight [R, C], the same for all unstructured patterns: their `keep` of it is the
        answer's mask. Dead inputs are worth least.
        """
        rows = max(1, BATCH_BYTES // (state.inverse_CC.numel() * state.inverse_CC.itemsize))
        scores_RC = torch.cat(
            [
                _sweep(W_BC.double(), state, pattern, slice(index * rows, index * rows + len(W_BC)))
                for index, W_BC in enumerate(torch.split(W_RC, rows))
            ]
        )
        return dead_first(scores_RC, state.dead_C)


def _sweep(W_BC: Tensor, state: Inverted, pattern: Pattern, rows: slice) -> Tensor:
    """Removes weights from every row as long as the pattern allows; returns what each was worth, inf for those left.

    In a row the worth rises strictly in the order of removal, so that a threshold on it cuts the order.
    """
    W_BC, B = W_BC.clone(), torch.arange(len(W_BC), device=W_BC.device)
    G_BCC = state.inverse_CC.repeat(len(W_BC), 1, 1)
    keep_BC = torch.ones_like(W_BC, dtype=torch.bool)
    worth_BC = torch.full_like(W_BC, torch.inf)
    last_B = W_BC.new_full((len(W_BC),), -torch.inf)
    for _ in range(W_BC.shape[1]):
        may_BC = pattern.may_prune(keep_BC, rows)
        active_B = may_BC.any(1)
        if not bool(active_B.any()):
            break
        cost_BC = dead_first(W_BC.square() / G_BCC.diagonal(dim1=1, dim2=2), state.dead_C)
        q_B = cost_BC.masked_fill(~may_BC, torch.inf).argmin(1)
        last_B = torch.maximum(cost_BC[B, q_B], torch.nextafter(last_B, last_B.new_tensor(torch.inf)))
        b_B = B[active_B]
        worth_BC[b_B, q_B[b_B]] = last_B[b_B]
        keep_BC[b_B, q_B[b_B]] = False
        _eliminate(W_BC, G_BCC, active_B, q_B)
    return worth_BC


def _eliminate(W_BC: Tensor, G_BCC: Tensor, active_B: Tensor, q_B: Tensor) -> None:
    """The OBS update of the active rows, in place: w −= G_q w_q / G_qq, G −= G_q G_qᵀ / G_qq."""
    index_B1 = q_B[:, None]
    column_BC = G_BCC.gather(2, q_B[:, None, None].expand(-1, G_BCC.shape[1], 1))[:, :, 0]
    pivot_B1 = column_BC.gather(1, index_B1)
    step_BC = column_BC / pivot_B1 * active_B[:, None]
    W_BC -= step_BC * W_BC.gather(1, index_B1)
    G_BCC -= step_BC[:, :, None] * column_BC[:, None, :]
    diagonal_BC = G_BCC.diagonal(dim1=1, dim2=2)
    diagonal_BC.scatter_(1, index_B1, torch.where(active_B[:, None], 1.0, diagonal_BC.gather(1, index_B1)))
    W_BC.scatter_(1, index_B1, torch.where(active_B[:, None], 0.0, W_BC.gather(1, index_B1)))
