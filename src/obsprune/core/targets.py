"""Corrected targets: what a layer of the pruned model should be so that its outputs match the dense model's.

The pruned model's layer sees drifted inputs x, the dense one's sees y. Wanted is min over sparse Z of ‖Z X − T‖² with
T = W Y (+ what the residual stream lost before this layer). Completing the square, that is the plain layer problem with
W̃ in the place of W, so that every solver works unchanged (algorithms: section 7). All is summed as what is missing,
t − W x, and not as t itself: that is small, and so are its rounding errors.
Legend: W_RC dense weight, H_CC = Σ x xᵀ, A_CC = H + λI, D_RC = Σ (t − W x) xᵀ, M_RC = W̃ − W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obsprune.core.linalg import damped
from obsprune.errors import NotPositiveDefinite

MOST = 0.75
"""How far from W to W̃ at most. All the way (1) looks best to a single layer, on held-out tokens too, and is worse for
the model: docs/methods.md, "Corrected targets"."""


def correction(D_RC: Tensor, H_CC: Tensor, damping: float) -> Tensor:
    """M = D (H + λI)⁻¹. Raises NotPositiveDefinite.

    Damped by the same λ, a solver's own problem with W + M has the solution of ‖Z X − T‖² + λ‖Z − W‖². Dead inputs keep
    W.
    """
    L_CC, info = torch.linalg.cholesky_ex(damped(H_CC, damping))
    if int(info):
        raise NotPositiveDefinite("a corrected target", 0, len(H_CC), damping)
    return torch.cholesky_solve(D_RC.T, L_CC).T


def gain_and_cost(layers: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """(tr M Dᵀ, tr M H Mᵀ), summed over all (M, D, H) with D and H of tokens that M does not come from."""
    gain = sum(float((M_RC * D_RC).sum(dtype=torch.float64)) for M_RC, D_RC, _ in layers)
    cost = sum(float(((M_RC @ H_CC) * M_RC).sum(dtype=torch.float64)) for M_RC, _, H_CC in layers)
    return gain, cost


def best_share(gain: float, cost: float, most: float = MOST) -> float:
    """The share α in [0, most] for which W + αM is nearest to its goal, by `gain_and_cost`:
    ‖(W + αM) X − T‖² = constant − 2α tr M Dᵀ + α² tr M H Mᵀ.
    """
    return min(max(gain / cost, 0.0), most) if cost > 0 else 0.0
