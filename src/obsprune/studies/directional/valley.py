"""Quadratic losses with a flat subspace that is known: gRDA's way on them, and what it should come to.

Legend: V the orthonormal rows that span range(H), h the eigenvalues, H = Vᵀ diag(h) V; S seeds, R rank, D weights.
All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obsprune.core.grda import GRDA
from obsprune.core.patterns import Lowest

POINTS = 4000
"""Of the rule that integrates s̄."""


@dataclass(frozen=True)
class Valley:
    """Losses ½ (w − w*)ᵀ H (w − w*), one a seed."""

    V_SRD: Tensor
    h_R: Tensor
    start_SD: Tensor
    bottom_SD: Tensor

    @classmethod
    def draw(cls, seeds: int, rank: int, weights: int) -> Valley:
        """Eigenvalues evenly from 1 to 2, everything else normal; seed by seed."""
        drawn = [_draw(seed, rank, weights) for seed in range(seeds)]
        V, start, bottom = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        return cls(V, torch.linspace(1, 2, rank, dtype=torch.float64), start, bottom)

    def steep(self, x_SD: Tensor) -> Tensor:
        """V x [S, R]."""
        return torch.einsum("srd,sd->sr", self.V_SRD, x_SD)

    def back(self, x_SR: Tensor) -> Tensor:
        """Vᵀ x [S, D]."""
        return torch.einsum("srd,sr->sd", self.V_SRD, x_SR)

    def flat(self, x_SD: Tensor) -> Tensor:
        """Π₀ x."""
        return x_SD - self.back(self.steep(x_SD))

    def gradient(self, w_SD: Tensor, noise_SR: Tensor) -> Tensor:
        """H (w − w*) + H^½ noise: noise as that of labels, without a share in the flat directions."""
        return self.back(self.h_R * self.steep(w_SD - self.bottom_SD) + self.h_R.sqrt() * noise_SR)

    def loss(self, w_SD: Tensor) -> Tensor:
        """[S]."""
        return (self.h_R * self.steep(w_SD - self.bottom_SD).square()).sum(-1) / 2


def _draw(seed: int, rank: int, weights: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    rows, start, bottom = (
        torch.randn(*shape, generator=random, dtype=torch.float64)
        for shape in ((weights, rank), (weights,), (weights,))
    )
    return torch.linalg.qr(rows)[0].T, start, bottom


def descend(
    valley: Valley, strengths: Sequence[float], rate: float, mu: float, steps: int, noise: float
) -> list[Tensor]:
    """The ends of gRDA [S, D], one for each c, all with the same noise; c = 0 is SGD."""
    random = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(valley.start_SD.clone()) for _ in strengths]
    groups = [{"params": [one], "c": c} for one, c in zip(parameters, strengths, strict=True)]
    optimizer = GRDA(groups, lr=rate, mu=mu)
    for _ in range(steps):
        noise_SR = noise * torch.randn(valley.V_SRD.shape[:2], generator=random, dtype=torch.float64)
        for one in parameters:
            one.grad = valley.gradient(one.detach(), noise_SR)
        optimizer.step()
    return [one.detach() for one in parameters]


def scores_in_time(valley: Valley, w_SD: Tensor, time: float, mu: float) -> Tensor:
    """s̄ of the theorem: with signs that no longer change, sign · (sign − t^−μ ∫₀ᵗ e^{−H(t−u)} H u^μ du sign) [S, D].

    In z = 1 − e^{−h(t−u)} the integral of one eigenvalue is ∫ (1 + log(1 − z) / (h t))^μ dz from 0 to 1 − e^{−ht}.
    """
    middle_T = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    end_R1 = -torch.expm1(-valley.h_R * time)[:, None]
    part_RT = 1 + torch.log1p(-middle_T * end_R1) / (valley.h_R[:, None] * time)
    share_R = end_R1[:, 0] * (part_RT**mu).mean(-1)
    return w_SD.sign() * (w_SD.sign() - valley.back(share_R * valley.steep(w_SD.sign())))


def sparsest_bottom(valley: Valley, strength: float, steps: int = 2000) -> Tensor:
    """argmin λ‖w‖₁ + ½ ‖w − w_0‖² over the w with Hw = Hw*, by ADMM with ρ = 1 [S, D]: exact zeros in the answer."""
    w_SD, u_SD = valley.start_SD.clone(), torch.zeros_like(valley.start_SD)
    for _ in range(steps):
        on_SD = valley.bottom_SD + valley.flat(w_SD - u_SD - valley.bottom_SD)
        v_SD = (valley.start_SD + on_SD + u_SD) / 2
        w_SD = v_SD - v_SD.clamp(-strength / 2, strength / 2)
        u_SD = u_SD + on_SD - w_SD
    return w_SD


def smallest_zeroed(w_SD: Tensor, counts: Sequence[int]) -> Tensor:
    """Magnitude pruning, to as many zeros in each row."""
    keep = [Lowest(count).keep(row.abs()[None])[0] for row, count in zip(w_SD, counts, strict=True)]
    return w_SD * torch.stack(keep)
