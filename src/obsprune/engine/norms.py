"""Batch norms after pruning: their statistics are those of the dense layers before them, whose outputs pruning has
shrunk. Here they are moved so that what leaves each norm has the mean and the variance it had before its block was
pruned.

Measured on the same inputs with the block's dense and pruned weights: m, v the mean and variance of what enters the
norm, μ, σ² its statistics, ε its own constant. (x − μ)/√(σ² + ε) keeps mean and variance when r = v'/v,
σ'² + ε = r (σ² + ε) and μ' = m' − (m − μ) √r. Where the statistics are the data's own (μ = m, σ² = v) this is plain
re-estimation; it also holds for norms folded into weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obsprune.models.walk import Stop
from obsprune.ranks import Ranks

Moments = tuple[Tensor, Tensor]


def batch_norms(block: nn.Module) -> list[nn.Module]:
    """The norms with running statistics inside a block, in module order."""
    return [module for module in block.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]


@dataclass(frozen=True)
class Renorm:
    """Remembers what entered each norm of a dense block. keys: the batches that count, in each process."""

    keys: Iterable[int]
    ranks: Ranks
    before: dict[nn.Module, Moments]

    @classmethod
    def of(cls, stop: Stop, keys: Iterable[int], ranks: Ranks) -> Renorm:
        """Measures a block with its dense weights."""
        return cls(keys, ranks, {norm: _moments(stop, norm, keys, ranks) for norm in batch_norms(stop.module)})

    def apply(self, stop: Stop) -> None:
        """Moves the statistics of the pruned block's norms, one after the other: each changes what enters the next."""
        for norm, (m, v) in self.before.items():
            now_m, now_v = _moments(stop, norm, self.keys, self.ranks)
            mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            r = torch.where((v > 0) & (now_v > 0), now_v / v, torch.ones_like(v))
            epsilon = float(getattr(norm, "eps", 0.0))
            mean.copy_(now_m - (m - mean.double()) * r.sqrt())
            variance.copy_((r * (variance.double() + epsilon) - epsilon).clamp_min(0))


def _moments(stop: Stop, norm: nn.Module, keys: Iterable[int], ranks: Ranks) -> Moments:
    """Mean and variance [channels] of what enters a norm, in float64; tensors are [n, channels, ...], all of one size
    but for n.
    """
    sums: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].float()
        variance, mean = (part.double() for part in torch.var_mean(x, [0, *range(2, x.dim())], correction=0))
        sums.append(len(x) * torch.stack([mean, variance + mean.square(), torch.ones_like(mean)]))

    handle = norm.register_forward_pre_hook(add)
    try:
        for key in keys:
            stop.run(key)
    finally:
        handle.remove()
    sums_3N = torch.stack(sums).sum(0)
    ranks.sum([sums_3N])
    total, squares, count = sums_3N
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)
