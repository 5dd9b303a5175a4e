"""Elimination–compensation (arXiv 2602.20467): a weight goes, and the bias beside it moves so that the network's output
moves least. The paper's formulas could not be had; these follow from its words.

To first order the output changes by J_r (δ − w_rc a_c) when w_rc is removed and the bias of its row moves by δ. Least
E‖·‖² is at δ = w_rc E[‖J_r‖² a_c] / E[‖J_r‖²], and is what the weight is worth:
w_rc² (E[‖J_r‖² a_c²] − E[‖J_r‖² a_c]² / E[‖J_r‖²]): its input's variance, where samples count as the output hears them.

Legend: W_RC weight, J_r = ∂output/∂(pre-activation of row r), a the layer's inputs x_BTC (B samples of T tokens), d_BTR
one cotangent of the output pulled back to the pre-activations; squares of d add up to ‖J‖² (or have it as their mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.core.saliency import Loss
from obsprune.core.statistics import Statistic


@final
class Heard(Statistic):
    """Σ‖J‖² [R], Σ‖J‖² a and Σ‖J‖² a² [R, C], in float64, for they are subtracted. Tokens of one sample count as
    samples of their own.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.q_R = torch.zeros(rows, dtype=torch.float64, device=device)
        self.qx_RC, self.qx2_RC = (torch.zeros(rows, columns, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, x_BTC: Tensor, d_BTR: Tensor) -> None:
        """Adds what one cotangent becomes: once a batch for a sketch, else once for each direction of the output."""
        x_NC, q_NR = x_BTC.flatten(0, 1), d_BTR.flatten(0, 1).square()
        self.q_R += q_NR.sum(0)
        self.qx_RC += q_NR.T @ x_NC
        self.qx2_RC += q_NR.T @ x_NC.square()
        self.count += len(x_NC)

    def tensors(self) -> dict[str, Tensor]:
        return {"q": self.q_R, "qx": self.qx_RC, "qx2": self.qx2_RC}

    @property
    def mean_RC(self) -> Tensor:
        """E[‖J‖² a] / E[‖J‖²]: by which the bias must grow for every unit of weight that goes; 0 for a row that the
        output does not hear.
        """
        return (self.qx_RC / self.q_R[:, None]).where(self.q_R[:, None] > 0, 0)

    def importance(self, W_RC: Tensor) -> Tensor:
        """The least squared change of the output, to first order, without the weight [R, C], float64; summed over all
        samples, so that layers with more tokens than others are ranked rightly beside them.
        """
        varies_RC = (self.qx2_RC - self.mean_RC * self.qx_RC).clamp_min(0)
        return W_RC.double().square() * varies_RC

    def uncompensated(self, W_RC: Tensor) -> Tensor:
        """The same where the bias stays: w² Σ ‖J‖² a²."""
        return W_RC.double().square() * self.qx2_RC


def of_outputs(z_BK: Tensor, asked: Tensor, loss: Loss) -> Sequence[Tensor]:
    """A cotangent for each of the K outputs: ‖J‖² exactly, for K backward passes."""
    return [row.expand_as(z_BK) for row in torch.eye(z_BK.shape[-1], dtype=z_BK.dtype, device=z_BK.device)]


@final
@dataclass(frozen=True)
class Sketch:
    """One cotangent of random signs: (vᵀJ)² has the mean ‖J‖², for one backward pass (Hutchinson 1990)."""

    generator: torch.Generator

    def __call__(self, z_BK: Tensor, asked: Tensor, loss: Loss) -> Sequence[Tensor]:
        signs = torch.randint(2, z_BK.shape, generator=self.generator).to(z_BK)
        return [2 * signs - 1]
