"""The steps of iterative Optimal Brain Surgeon (Wu et al., NeurIPS 2024, arXiv 2408.17163) and of its relatives.

`natural_direction` is the step of the rounds on whole models (engine/rounds.py). The others take the current point (a
vector), its gradient and the inverse of the Hessian, and give the next point, of k non-zeros: dense linear algebra of
the size of the vector, for single layers, small nets and studies. Optimal Brain Surgeon asks for H⁻¹, never for H, so
it is what they take: whoever stays with one Hessian inverts once, and a Topk step is one product of O(D²).
Legend: w_D the point, g_D the gradient, V_DD = H⁻¹ the inverse of the Hessian (positive definite), keep_D True =
survives, k survivors; g_RC the gradient of a matrix, U_CC upper triangular with (H + λI)⁻¹ = UᵀU.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from obsprune.core.patterns import prune_lowest


def natural_direction(g_RC: Tensor, U_CC: Tensor) -> Tensor:
    """g (H + λI)⁻¹: the gradient in the metric of the layer's inputs (a natural gradient with the input curvature).

    With g and H both sums over the same tokens the token count cancels: it is the direction of the two means.
    """
    return (g_RC @ U_CC.T) @ U_CC


def top_k(w_D: Tensor, k: int) -> Tensor:
    """T_k: the k entries of largest magnitude stay, the others become 0; ties keep the higher index."""
    return w_D.where(prune_lowest(w_D.abs(), len(w_D) - k), 0)


def k_iht(w_D: Tensor, g_D: Tensor, step: float, k: int) -> Tensor:
    """Iterative hard thresholding: T_k(w − η g)."""
    return top_k(w_D - step * g_D, k)


def newton_point(w_D: Tensor, g_D: Tensor, V_DD: Tensor) -> Tensor:
    """W⁺ = w − H⁻¹ g, the dense point that both options of I-OBS make sparse again (their Algorithm 1)."""
    return w_D - V_DD @ g_D


def topk_iobs(w_D: Tensor, g_D: Tensor, V_DD: Tensor, k: int) -> Tensor:
    """Option 1, Topk-I-OBS: T_k(w − H⁻¹ g)."""
    return top_k(newton_point(w_D, g_D, V_DD), k)


def stochastic_iobs(w_D: Tensor, g_D: Tensor, damping: float, k: int) -> Tensor:
    """I-OBS with the rank-one curvature of one gradient: T_k(w − g / (λ + ‖g_Q‖² / ‖g‖)), Q the support of w.

    A gradient of 0 leaves the point where it is.
    """
    norm = g_D.norm()
    if norm == 0:
        return top_k(w_D, k)
    return top_k(w_D - g_D / (damping + g_D[w_D != 0].square().sum() / norm), k)


def obs_cost(w_D: Tensor, V_DD: Tensor, keep_D: Tensor) -> float:
    """Wᵀ H^S w with H^S = I_Sᵀ (I_S H⁻¹ I_Sᵀ)⁻¹ I_S: the cost of removing S (where keep is False), twice the loss."""
    return float(w_D[~keep_D] @ _multipliers(w_D, V_DD, keep_D))


def obs_project(w_D: Tensor, V_DD: Tensor, keep_D: Tensor) -> Tensor:
    """(I − H⁻¹ H^S) w: the point closest to w in the norm of H among those with that support (an exact refit on it)."""
    return torch.where(keep_D, w_D - V_DD[:, ~keep_D] @ _multipliers(w_D, V_DD, keep_D), 0)


def best_support(w_D: Tensor, V_DD: Tensor, k: int) -> Tensor:
    """The keep mask of least `obs_cost` among all with k survivors, by trying them all: for a dozen entries at most."""
    masks = [torch.tensor([i in kept for i in range(len(w_D))]) for kept in combinations(range(len(w_D)), k)]
    return min(masks, key=lambda keep_D: obs_cost(w_D, V_DD, keep_D))


def greedy_support(w_D: Tensor, V_DD: Tensor, k: int) -> Tensor:
    """A good keep mask by Optimal Brain Surgeon: remove the weight of least w_q²/[H⁻¹]_qq, update, until k remain.

    The update of H⁻¹ by one elimination a weight: O(D²) each.
    """
    w_D, V_DD = w_D.clone(), V_DD.clone()
    keep_D = torch.ones_like(w_D, dtype=torch.bool)
    for _ in range(len(w_D) - k):
        saliency_D = (w_D.square() / V_DD.diagonal()).masked_fill(~keep_D, torch.inf)
        q = int(saliency_D.argmin())
        column_D, pivot = V_DD[:, q].clone(), V_DD[q, q].clone()
        w_D -= column_D * (w_D[q] / pivot)
        V_DD.addr_(column_D, column_D / pivot, alpha=-1)
        V_DD[q, q] = 1  # gone: never asked for again, and no 0/0 in the saliency
        keep_D[q] = False
        w_D[q] = 0
    return keep_D


def obs_iobs(w_D: Tensor, g_D: Tensor, V_DD: Tensor, k: int) -> Tensor:
    """Option 2: the Newton point, projected by OBS onto k entries (chosen greedily: the exact choice is NP-hard)."""
    point_D = newton_point(w_D, g_D, V_DD)
    return obs_project(point_D, V_DD, greedy_support(point_D, V_DD, k))


def _multipliers(w_D: Tensor, V_DD: Tensor, keep_D: Tensor) -> Tensor:
    """(I_S H⁻¹ I_Sᵀ)⁻¹ w_S: Lagrange's, of the constraint that S is 0."""
    multipliers_S: Tensor = torch.linalg.solve(V_DD[~keep_D][:, ~keep_D], w_D[~keep_D])
    return multipliers_S
