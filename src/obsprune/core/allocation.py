"""How sparse each matrix is, with one exact budget for all of them (algorithms: section 9).

A rule gives each matrix a share of zeros; `counts` turns shares into whole numbers that add up to the budget.
Legend: s_M share of each of M matrices, n_M weights of each, E_ML error of each at each of L levels of sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from obsprune.core.statistics import Gram

OUTLIER, SPREAD = 5.0, 0.08
"""OWL (Yin et al. 2024): what exceeds the mean so many times is an outlier; shares stay this near to the target."""
LEVELS = (-0.2, -0.1, 0.0, 0.1, 0.2)
"""Levels of sparsity that are probed, relative to the target."""
CAP = 0.99
"""No matrix loses more than this share, unless all together do."""


def counts(s_M: Sequence[float], n_M: Sequence[int], budget: int) -> list[int]:
    """Zeros of each matrix, near s·n and exactly `budget` together: all shares are shifted by one amount, kept within
    [0, CAP], and rounded by largest remainders (ties by index).
    """
    s, n = torch.tensor(s_M, dtype=torch.float64), torch.tensor(n_M, dtype=torch.float64)
    cap = max(CAP, budget / sum(n_M))
    exact = n * (s + _shift(s, n, budget, cap)).clamp(0, cap)
    whole = exact.floor()
    order = torch.argsort(exact - whole, descending=True, stable=True)
    whole[order[: budget - int(whole.sum())]] += 1
    return [int(count) for count in whole]


def levels_around(sparsity: float) -> list[float]:
    """The levels a matrix is probed at, ascending, the target among them."""
    return sorted({min(max(sparsity + step, 0.0), max(CAP, sparsity)) for step in LEVELS})


def _shift(s_M: Tensor, n_M: Tensor, budget: int, cap: float) -> float:
    """The amount t for which Σ n·clamp(s + t, 0, cap) is the budget, by bisection."""
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float((n_M * (s_M + middle).clamp(0, cap)).sum()) < budget:
            low = middle
        else:
            high = middle
    return low


def outlier_share(weights: Sequence[tuple[Tensor, Gram]]) -> float:
    """OWL's measure of one block: the share of its |W|·‖X‖ that exceeds OUTLIER times their mean."""
    scores = torch.cat([(W_RC.abs() * gram.H_CC.diagonal().sqrt()).flatten() for W_RC, gram in weights])
    return float((scores > OUTLIER * scores.mean()).double().mean())


def owl(outliers: Sequence[float], sparsity: float) -> list[float]:
    """Shares of blocks from their outlier shares: many outliers, few zeros; within ± SPREAD of the target."""
    o = torch.tensor(outliers, dtype=torch.float64)
    width = float(o.max() - o.min())
    scaled = (o - o.min()) / width * 2 * SPREAD if width else torch.zeros_like(o)
    return [float(share) for share in sparsity - (scaled - scaled.mean())]


def by_importance(errors: Sequence[float], sparsity: float) -> list[float]:
    """Shares of blocks in proportion to 1 − E/ΣE: the more it costs to prune a block alone, the fewer zeros."""
    e = torch.tensor(errors, dtype=torch.float64)
    importance = 1 - e / e.sum() if float(e.sum()) > 0 and len(e) > 1 else torch.ones_like(e)
    return [float(share) for share in sparsity * importance / importance.mean()]


def knapsack(E_ML: Sequence[Sequence[float]], levels: Sequence[float], n_M: Sequence[int], budget: int) -> list[float]:
    """Shares of least Σ E under the budget, E between two levels taken as linear and its lower convex hull as E.

    Greedy along the hulls: always the cheapest next zeros, the last piece in part. All start at the lowest level.
    """
    pieces = [
        (slope, matrix, width)
        for matrix, (E_L, size) in enumerate(zip(E_ML, n_M, strict=True))
        for slope, width in _hull(levels, E_L, size)
    ]
    shares = [levels[0]] * len(n_M)
    left = budget - levels[0] * sum(n_M)
    for _, matrix, width in sorted(pieces):
        taken = min(width * n_M[matrix], max(left, 0.0))
        shares[matrix] += taken / n_M[matrix]
        left -= taken
    return shares


def _hull(levels: Sequence[float], E_L: Sequence[float], size: int) -> list[tuple[float, float]]:
    """(error per further zero, width) of each piece of the lower convex hull, in order of growing slope."""
    points: list[tuple[float, float]] = []
    for x, y in zip(levels, E_L, strict=True):
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], (x, y)):
            points.pop()
        points.append((x, y))
    return [(_slope(a, b) / size, b[0] - a[0]) for a, b in pairwise(points)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
