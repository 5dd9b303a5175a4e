"""Linear algebra of the layer problem  min over sparse Z of tr (W−Z) H (W−Z)ᵀ.

Legend: W_RC dense weight, Z_RC sparse weight, H_CC Gram (Σ x xᵀ), A_CC damped Gram, K_CC upper triangular with A = KKᵀ,
U_CC = K⁻¹, so that A⁻¹ = UᵀU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from obsprune.core.statistics import Gram
from obsprune.errors import NotPositiveDefinite

LADDER = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Dampings climbed, after the one asked for, until the Cholesky factorisation succeeds."""

BATCH_BYTES = 2**28
"""Systems of rows that are solved together stay under this."""


FACTOR_COLUMNS = 128
"""That are factorised together: the rest is matrix products, which are twice as fast as LAPACK's factorisation."""

LOSS_COLUMNS = 512
"""Of one part of a layer loss."""


@dataclass(frozen=True)
class Factor:
    """K_CC with H + λI = KKᵀ, and the damping really used (a share of the mean live diagonal)."""

    K_CC: Tensor
    damping: float

    @cached_property
    def U_CC(self) -> Tensor:
        """The factor of the inverse, (H + λI)⁻¹ = UᵀU; three times the work of K itself."""
        eye_CC = torch.eye(len(self.K_CC), dtype=self.K_CC.dtype, device=self.K_CC.device)
        U_CC: Tensor = torch.linalg.solve_triangular(self.K_CC, eye_CC, upper=True)
        return U_CC


def layer_loss(D_RC: Tensor, H_CC: Tensor) -> float:
    """`layer_loss_on_device` as a number, for which a GPU is waited for."""
    return float(layer_loss_on_device(D_RC, H_CC))


def layer_loss_on_device(D_RC: Tensor, H_CC: Tensor) -> Tensor:
    """tr D H Dᵀ = ‖D X‖², the squared output error that a weight change D causes: (output)² summed over tokens; in
    float64, and not waited for.

    H is symmetric: Σ_b (2 D_{<b} H_{<b,b} + D_b H_bb) · D_b over parts b of the columns, half of the work.
    """
    D_RC, loss = D_RC.to(H_CC.dtype), H_CC.new_zeros((), dtype=torch.float64)
    for start in range(0, D_RC.shape[1], LOSS_COLUMNS):
        D_RB, H_CB = D_RC[:, start : start + LOSS_COLUMNS], H_CC[:, start : start + LOSS_COLUMNS]
        here_RB = D_RB @ H_CB[start : start + LOSS_COLUMNS]
        loss += torch.addmm(here_RB, D_RC[:, :start], H_CB[:start], alpha=2).mul_(D_RB).sum(dtype=torch.float64)
    return loss


def dead_columns(H_CC: Tensor) -> Tensor:
    """Inputs that were zero on every token: bool [C]."""
    return H_CC.diagonal() == 0


def damped(H_CC: Tensor, damping: float) -> Tensor:
    """A = H + λI with λ = damping·(mean of the live diagonal); a dead column first gets that mean as its diagonal."""
    dead_C = dead_columns(H_CC)
    diagonal_C = H_CC.diagonal()
    live_L = diagonal_C[~dead_C]
    mean = live_L.mean() if len(live_L) else diagonal_C.new_ones(())
    A_CC = H_CC.clone()
    A_CC.diagonal().copy_(torch.where(dead_C, mean, diagonal_C) + damping * mean)
    return A_CC


def upper_factor(A_CC: Tensor) -> Tensor | None:
    """Upper K with A = KKᵀ; None when A is not positive definite, or so nearly singular that dividing by K overflows.

    From the last columns to the first, FACTOR_COLUMNS at a time: A less what is factorised already, by one matrix
    product; of its diagonal block by the flip trick (with J the reversal and L = chol(J A J), K = J L J is upper
    triangular and KKᵀ = A); and of what is above by a triangular solve.
    """
    K_CC, faults = A_CC.clone(), []
    for last in range(len(A_CC), 0, -FACTOR_COLUMNS):
        block, above = slice(max(last - FACTOR_COLUMNS, 0), last), slice(0, max(last - FACTOR_COLUMNS, 0))
        K_CC[:last, block].addmm_(K_CC[:last, last:], K_CC[block, last:].T, alpha=-1)
        L_BB, fault = torch.linalg.cholesky_ex(K_CC[block, block].flip(0, 1))
        K_BB = L_BB.flip(0, 1)
        K_CC[above, block] = torch.linalg.solve_triangular(K_BB.T, K_CC[above, block], upper=False, left=False)
        K_CC[block, block], K_CC[block, above] = K_BB, 0
        faults.append(fault)
    divided_C1 = torch.linalg.solve_triangular(K_CC, torch.ones_like(K_CC[:, :1]), upper=True)
    faults.append((~divided_C1.isfinite()).any())
    return None if any(torch.stack(faults).tolist()) else K_CC  # a GPU is waited for once


def factorise(gram: Gram, damping: float) -> Factor:
    """The factor of the damped Gram: the ladder of dampings in the Gram's dtype, then again in float64.

    Raises NotPositiveDefinite when nothing helps; never another matrix in silence.
    """
    steps = [damping, *(step for step in LADDER if step > damping)]
    for dtype in dict.fromkeys((gram.H_CC.dtype, torch.float64)):
        for step in steps:
            K_CC = upper_factor(damped(gram.H_CC.to(dtype), step))
            if K_CC is not None:
                return Factor(K_CC.to(gram.H_CC.dtype), step)
    raise NotPositiveDefinite(gram.name, gram.count, len(gram.H_CC), steps[-1])


def refit(W_RC: Tensor, Z_RC: Tensor, A_CC: Tensor, keep_RC: Tensor, steps: int) -> Tensor:
    """Moves Z toward the minimiser of tr (W−Z) A (W−Z)ᵀ on its support by masked conjugate gradients, rows at once.

    Jacobi preconditioner; the restriction of A to a row's support is positive definite, so the loss never rises in
    exact arithmetic. Rows that have converged (<R, Y> = 0) stand still.
    """
    inverse_diagonal_C = A_CC.diagonal().reciprocal()
    R_RC = ((W_RC - Z_RC) @ A_CC).mul_(keep_RC)
    Y_RC = R_RC * inverse_diagonal_C
    P_RC, rho_R1 = Y_RC, (R_RC * Y_RC).sum(1, keepdim=True)
    for _ in range(steps):
        Q_RC = (P_RC @ A_CC).mul_(keep_RC)
        alpha_R1 = _ratio(rho_R1, (P_RC * Q_RC).sum(1, keepdim=True))
        Z_RC = Z_RC + alpha_R1 * P_RC
        R_RC = R_RC - alpha_R1 * Q_RC
        Y_RC = R_RC * inverse_diagonal_C
        rho_R1, before_R1 = (R_RC * Y_RC).sum(1, keepdim=True), rho_R1
        P_RC = Y_RC + _ratio(rho_R1, before_R1) * P_RC
    return Z_RC


def exact_refit(W_RC: Tensor, A_CC: Tensor, keep_RC: Tensor) -> Tensor:
    """The minimiser of tr (W−Z) A (W−Z)ᵀ on each row's support, by a Cholesky factorisation a row.

    A_KK (z − w)_K = A_KP w_P, K the kept and P the pruned columns of the row: where nothing is pruned nothing moves.
    Rows are taken in batches of BATCH_BYTES. Raises NotPositiveDefinite.
    """
    size = max(1, BATCH_BYTES // (A_CC.numel() * A_CC.itemsize))
    parts = zip(torch.split(W_RC, size), torch.split(keep_RC, size), strict=True)
    return torch.cat([_refit_rows(W_BC, A_CC, keep_BC) for W_BC, keep_BC in parts])


def _refit_rows(W_BC: Tensor, A_CC: Tensor, keep_BC: Tensor) -> Tensor:
    """One batch: systems of all C columns, in which the pruned ones stand apart with a diagonal of their own."""
    pruned_BC = W_BC.masked_fill(keep_BC, 0)
    right_BC = (pruned_BC @ A_CC).mul_(keep_BC)
    A_BCC = A_CC * keep_BC[:, :, None] * keep_BC[:, None, :]
    A_BCC.diagonal(dim1=1, dim2=2).add_(A_CC.diagonal() * ~keep_BC)
    L_BCC, info = torch.linalg.cholesky_ex(A_BCC)
    if bool(info.any()):
        raise NotPositiveDefinite("a layer to refit", 0, len(A_CC), 0.0)
    move_BC = torch.cholesky_solve(right_BC[:, :, None], L_BCC)[:, :, 0]
    return (W_BC + move_BC).masked_fill(~keep_BC, 0)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where below is 0: a converged row takes no further step."""
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0)
