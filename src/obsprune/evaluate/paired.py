"""Whether two models differ by more than chance: item by item, over the same documents, images or questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def paired(items: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """For each quantity that both have of every item: mean difference (first − other), its standard error, and p, the
    probability of one at least as large if the models were alike (two-sided, normal: mean over standard error).
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
    return {"difference": mean, "stderr": stderr, "p": _p(mean, stderr), "items": len(difference_N)}


def _p(mean: float, stderr: float) -> float:
    if stderr == 0:
        return 1.0 if mean == 0 else 0.0
    return math.erfc(abs(mean) / stderr / math.sqrt(2))
