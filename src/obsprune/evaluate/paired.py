"""Whether two models differ by more than chance: item by item, over the same documents, images or questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MANY = 100
"""Items that differ, from which on a mean counts as normal."""
FLIPS = 2**14


def paired(items: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """For each quantity that both have of every item: mean difference (first − other), its standard error, and p, the
    probability of one at least as large if the models were alike (two-sided).
    """
    shared = [name for name in items if name in others and len(items[name]) == len(others[name]) > 1]
    return {name: _paired(items[name], others[name]) for name in shared}


def beside(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, float]:
    """The ratio of two perplexities, where there are perplexities."""
    name = "perplexity"
    return {"ratio": values[name] / others[name]} if name in values and name in others else {}


def _paired(items: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    difference_N = torch.tensor(items, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    mean, stderr = float(difference_N.mean()), float(difference_N.std()) / math.sqrt(len(difference_N))
    return {"difference": mean, "stderr": stderr, "p": _p(difference_N), "items": len(difference_N)}


def _p(difference_N: Tensor) -> float:
    """Items without a difference say nothing. Many others: the mean over its standard error is normal. Few: the share
    of all ways to turn their signs round (or of FLIPS random ones) that give a mean as large.
    """
    d_M = difference_N[difference_N != 0]
    count = len(d_M)
    if count == 0:
        return 1.0
    if count >= MANY:
        stderr = float(difference_N.std()) / math.sqrt(len(difference_N))
        return math.erfc(abs(float(difference_N.mean())) / stderr / math.sqrt(2)) if stderr else 0.0
    signs_FM = _signs(count)
    as_large = (signs_FM @ d_M).abs() >= d_M.sum().abs() * (1 - 1e-9)
    return float(as_large.double().mean())


def _signs(count: int) -> Tensor:
    """Ways to choose `count` signs [ways, count]: all of them, or the true one and FLIPS at random."""
    if 2**count <= FLIPS:
        ways = torch.arange(2**count)[:, None] >> torch.arange(count)
        return 1.0 - 2.0 * (ways & 1).double()
    random = torch.randint(2, (FLIPS, count), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.ones(1, count).double(), 1.0 - 2.0 * random.double()])
