"""Optimal Brain Surgeon on a vector of weights (Hassibi & Stork, 1992), exactly, and its relatives.

One formula. Of all steps that bring w onto the plane aᵀw = b, the one that raises ½ δwᵀ H δw least is
δw = −(aᵀw − b) / (aᵀH⁻¹a) · H⁻¹a, and it raises it by L = (aᵀw − b)² / (2 aᵀH⁻¹a). With a = e_q and b = 0 a weight is
deleted: their equation 5. With H diagonal it is Optimal Brain Damage, with H = 1 magnitude: these only set w_q to 0.

Every function takes several nets at once: all shapes may have the same dimensions in front ("…" below).
Legend: w_P weights; X_MP gradients of outputs, one row a pattern and output; H_PP Hessian, inverse_PP = H⁻¹; A_KP
normals a of K planes, b_K what aᵀw is to be; F_PP the projector onto the directions that are still free.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

HELD = 1e-9
"""A plane whose normal has no more than this (squared) outside of the planes already held is one of them."""


def inverse_hessian(X_MP: Tensor, patterns: int, alpha: float) -> Tensor:
    """H⁻¹ for H = αI + (1/P) Σ X Xᵀ in one pass over the data, by Woodbury's identity (their equation 17) […, P, P].

    X_MP: […, M, P], the rows of all outputs of all patterns: several outputs are more rows of the same sum. `patterns`
    is P, by which the sum is divided; α (1e-8 … 1e-4 in the paper) is H before the first row, and makes H regular.
    """
    size = X_MP.shape[-1]
    inverse_PP = (torch.eye(size, dtype=X_MP.dtype, device=X_MP.device) / alpha).expand(*X_MP.shape[:-2], size, size)
    for X_P1 in X_MP.unsqueeze(-1).unbind(-3):
        Y_P1 = inverse_PP @ X_P1
        inverse_PP = inverse_PP - Y_P1 @ Y_P1.mT / (patterns + X_P1.mT @ Y_P1)
    return inverse_PP


def saliency(w_P: Tensor, inverse_PP: Tensor) -> Tensor:
    """L_q = w_q² / (2 [H⁻¹]_qq) of every weight […, P] (their equation 5)."""
    return w_P.square() / (2 * inverse_PP.diagonal(dim1=-2, dim2=-1))


def plane_costs(w_P: Tensor, inverse_PP: Tensor, A_KP: Tensor, b_K: Tensor | float = 0.0) -> Tensor:
    """L = (aᵀw − b)² / (2 aᵀH⁻¹a) of every plane […, K]; a plane with a = 0 cannot be chosen: its cost is infinite."""
    gap_K = (A_KP @ w_P.unsqueeze(-1)).squeeze(-1) - b_K
    spread_K = ((A_KP @ inverse_PP) * A_KP).sum(-1)
    return torch.where(A_KP.square().sum(-1) > HELD, gap_K.square() / (2 * spread_K), torch.inf)


def plane_step(w_P: Tensor, inverse_PP: Tensor, a_P: Tensor, b: Tensor | float = 0.0) -> Tensor:
    """δw = −(aᵀw − b) / (aᵀH⁻¹a) · H⁻¹a, the cheapest step onto one plane […, P]."""
    Y_P = (inverse_PP @ a_P.unsqueeze(-1)).squeeze(-1)
    return -(((a_P * w_P).sum(-1) - b) / (a_P * Y_P).sum(-1)).unsqueeze(-1) * Y_P


def deletion_step(w_P: Tensor, inverse_PP: Tensor, q: int) -> Tensor:
    """δw = −(w_q / [H⁻¹]_qq) H⁻¹ e_q, which deletes weight q and adjusts all others […, P] (their equation 5)."""
    return plane_step(w_P, inverse_PP, torch.eye(w_P.shape[-1], dtype=w_P.dtype, device=w_P.device)[q])


def hold(F_PP: Tensor, a_P: Tensor) -> Tensor:
    """F without the direction a: what is free once aᵀw is held as well. a must lie in F (a = F a) and not be 0.

    For planes w_q = 0 alone F is diagonal, its diagonal is the mask of the weights left, and all of it is exact.
    """
    return F_PP - a_P.unsqueeze(-1) * a_P.unsqueeze(-2) / a_P.square().sum(-1)[..., None, None]


def sharing_planes(groups: Sequence[Sequence[int]], size: int) -> Tensor:
    """Normals of the planes w_i = w_j and w_i = −w_j for all pairs within each group: two weights become one [K, P]."""
    rows = [(i, j, sign) for group in groups for i, j in combinations(group, 2) for sign in (-1.0, 1.0)]
    A_KP = torch.zeros(len(rows), size, dtype=torch.float64)
    for row, (i, j, sign) in enumerate(rows):
        A_KP[row, i], A_KP[row, j] = 1.0, sign
    return A_KP
