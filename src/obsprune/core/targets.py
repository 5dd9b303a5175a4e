"""Corrected targets: what a layer of the pruned model should be so that its outputs match the dense model's.

The pruned model's layer sees drifted inputs x, the dense one's sees y. Wanted is min over sparse Z of ‖Z X − T‖² with
T = W Y (+ what the residual stream lost before this layer). Completing the square, that is the plain layer problem with
W̃ in the place of W, so that every solver works unchanged (algorithms: section 7).
Legend: W_RC dense weight, H_CC = Σ x xᵀ, A_CC = H + λI, K_RC = T Xᵀ = Σ t xᵀ; V_RC a weight to judge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obsprune.core.linalg import damped
from obsprune.errors import NotPositiveDefinite

SHARES = (0.0, 0.25, 0.5, 0.75)
"""How far from W to W̃ is tried: the correction overfits where tokens are few. All the way (1) looks best to a single
layer, on held-out tokens too, and is worse for the model: README, "Corrected targets"."""


def corrected(W_RC: Tensor, K_RC: Tensor, H_CC: Tensor, damping: float) -> Tensor:
    """W̃ = (K + λW)(H + λI)⁻¹. Raises NotPositiveDefinite.

    Damped by the same λ, a solver's own problem with W̃ has the solution of ‖Z X − T‖² + λ‖Z − W‖². Dead inputs keep W.
    """
    A_CC = damped(H_CC, damping)
    ridge_C = A_CC.diagonal() - H_CC.diagonal()  # λ, and for a dead input its whole stand-in diagonal
    L_CC, info = torch.linalg.cholesky_ex(A_CC)
    if int(info):
        raise NotPositiveDefinite("a corrected target", 0, len(H_CC), damping)
    return torch.cholesky_solve((K_RC + W_RC * ridge_C).T, L_CC).T


def mismatch(V_RC: Tensor, K_RC: Tensor, H_CC: Tensor) -> float:
    """‖V X − T‖² up to a constant that V does not change: tr V H Vᵀ − 2 tr V Kᵀ."""
    return float(((V_RC @ H_CC - 2 * K_RC) * V_RC).sum(dtype=torch.float64))
