"""ADMM with rising penalty: mask and weights together, at the quality of ALPS (Meng et al. 2024) without its
eigendecomposition (algorithms: section 5).

The layer problem is split in two copies of the answer: B may be dense and minimises the loss, D obeys the pattern; V
(scaled multipliers) and a penalty ρ pull them together. For small ρ the mask moves freely, for large ρ it settles.
Legend: A_CC = H + λI; s_C = √diag A; the search runs on the scaled problem, N_CC = A/(s sᵀ) with unit diagonal and the
dense weight X_RC = W·s, M_CC = (N + ρI)⁻¹; Z_RC the sparse answer; keep_RC True = survives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from obsprune.core.linalg import damped, dead_columns, layer_loss_on_device, refit
from obsprune.core.patterns import Pattern
from obsprune.core.products import quick_product
from obsprune.core.statistics import Gram
from obsprune.errors import NotPositiveDefinite
from obsprune.solvers.base import Solver, State, dead_first

RHO = 0.1
"""The first penalty; the diagonal of N is 1."""
FREE, GROUPED = (2.0, 8), (1.5, 12)
"""(growth, number) of the penalties where each weight is judged by itself, and where columns are judged in groups."""
Dense = Callable[[Tensor, Tensor, float, Tensor], Tensor]
"""V_RC, D_RC, ρ, M_CC -> B_RC."""


@dataclass(frozen=True)
class Scaled(State):
    """A_CC, N_CC, s_C as above; dead_C: inputs that were always zero; inverses {ρ: M_CC}, for all its matrices."""

    A_CC: Tensor
    N_CC: Tensor
    s_C: Tensor
    dead_C: Tensor
    inverses: dict[float, Tensor] = field(default_factory=dict)

    def inverse(self, rho: float) -> Tensor:
        """M_CC = (N + ρI)⁻¹, computed once. Raises NotPositiveDefinite."""
        if rho not in self.inverses:
            shifted_CC = self.N_CC.clone()
            shifted_CC.diagonal().add_(rho)
            L_CC, info = torch.linalg.cholesky_ex(shifted_CC)
            if int(info):
                raise NotPositiveDefinite(self.gram.name, self.gram.count, len(self.A_CC), self.damping)
            self.inverses[rho] = torch.cholesky_inverse(L_CC)
        return self.inverses[rho]


@final
@dataclass(frozen=True)
class ADMM(Solver[Scaled]):
    """damping: λ as a share of the mean diagonal. inner: iterations at each ρ. polish: PCG steps on the final mask."""

    workspace = (13, 9)  # N, A, and an inverse for each penalty
    damping: float = 0.01
    inner: int = 6
    polish: int = 20

    def prepare(self, gram: Gram) -> Scaled:
        A_CC = damped(gram.H_CC, self.damping)
        s_C = A_CC.diagonal().sqrt()
        return Scaled(gram, self.damping, A_CC, A_CC / s_C / s_C[:, None], s_C, dead_columns(gram.H_CC))

    def search(self, W_RC: Tensor, state: Scaled, pattern: Pattern) -> tuple[Tensor, Tensor]:
        D_RC, keep_RC = self._split(W_RC * state.s_C, state, pattern)
        start_RC = _nearer(W_RC, (D_RC / state.s_C).where(keep_RC, 0), W_RC.where(keep_RC, 0), state.A_CC)
        return refit(W_RC, start_RC, state.A_CC, keep_RC, self.polish), keep_RC

    def _split(self, X_RC: Tensor, state: Scaled, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The ladder of penalties; it ends early when the mask is the same at the end of two of them."""
        dense, V_RC = (_differing if X_RC.is_cuda else _whole)(X_RC, state.N_CC), torch.zeros_like(X_RC)
        keep_RC = pattern.keep(dead_first(X_RC.abs(), state.dead_C))
        D_RC = X_RC.where(keep_RC, 0)
        growth, number = FREE if pattern.group is None else GROUPED
        for rung in range(number):
            rho, before_RC = RHO * growth**rung, keep_RC
            M_CC = state.inverse(rho)
            for _ in range(self.inner):
                B_RC = dense(V_RC, D_RC, rho, M_CC)
                T_RC = B_RC + V_RC / rho
                keep_RC = pattern.keep(dead_first(T_RC.abs(), state.dead_C))
                D_RC = T_RC.where(keep_RC, 0)
                V_RC = V_RC + rho * (B_RC - D_RC)
            if rung and torch.equal(keep_RC, before_RC):
                break
        return D_RC, keep_RC


def _whole(X_RC: Tensor, N_CC: Tensor) -> Dense:
    """B = (X N − V + ρD) M: the minimiser where D, V and ρ are given."""
    G_RC = X_RC @ N_CC
    return lambda V_RC, D_RC, rho, M_CC: (G_RC - V_RC + rho * D_RC) @ M_CC


def _differing(X_RC: Tensor, N_CC: Tensor) -> Dense:
    """The same as X and what B differs from it by, for a GPU: without X N, whose largest part M would have to cancel,
    the 11 bits of TF32 suffice (tests/solvers/test_tf32.py).
    """
    return lambda V_RC, D_RC, rho, M_CC: X_RC + quick_product(rho * (D_RC - X_RC) - V_RC, M_CC)


def _nearer(W_RC: Tensor, one_RC: Tensor, other_RC: Tensor, A_CC: Tensor) -> Tensor:
    """Of two sparse points the one of less loss: where nothing or little is pruned, that is the weight itself."""
    one, other = (layer_loss_on_device(W_RC - Z_RC, A_CC) for Z_RC in (one_RC, other_RC))
    return one_RC if bool(one < other) else other_RC
