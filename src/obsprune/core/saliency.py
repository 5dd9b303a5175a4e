"""How much the loss rises without a weight: scores for methods about the whole loss, and the curvature they need.

Legend: W_RC weight of one matrix, g_RC gradient of the mean loss, h_RC diagonal of its Hessian or what stands for it;
x_BTC inputs and d_BTR gradients at the outputs of B samples of T tokens each, so that Σ_t d xᵀ is a sample's gradient;
z_BK logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of logits [B, K] and what is asked for [B, …]."""


@dataclass(frozen=True)
class Evidence:
    """What the data say about one matrix: gradient and curvature, [R, C] both."""

    g_RC: Tensor
    h_RC: Tensor


class Saliency(ABC):
    """A score for every weight: the lower, the sooner it goes. Never negative."""

    @abstractmethod
    def score(self, W_RC: Tensor, evidence: Evidence) -> Tensor:
        """[R, C]."""


@final
@dataclass(frozen=True)
class Magnitude(Saliency):
    """|w|."""

    def score(self, W_RC: Tensor, evidence: Evidence) -> Tensor:
        return W_RC.abs()


@final
@dataclass(frozen=True)
class FirstOrder(Saliency):
    """|g w|: the first term of the Taylor expansion (Molchanov et al. 2017)."""

    def score(self, W_RC: Tensor, evidence: Evidence) -> Tensor:
        return (evidence.g_RC * W_RC).abs()


@final
@dataclass(frozen=True)
class Taylor(Saliency):
    """|−g w + ½ h w²|: the loss without the weight, to second order, h the diagonal alone."""

    def score(self, W_RC: Tensor, evidence: Evidence) -> Tensor:
        return (-evidence.g_RC * W_RC + evidence.h_RC * W_RC.square() / 2).abs()


@final
@dataclass(frozen=True)
class OptimalBrainDamage(Saliency):
    """½ h w² (LeCun et al. 1989): as Taylor at a minimum, where g = 0."""

    def score(self, W_RC: Tensor, evidence: Evidence) -> Tensor:
        return evidence.h_RC * W_RC.square() / 2


class Diagonal(ABC):
    """The diagonal of a Fisher or Gauss–Newton matrix, a sum over samples."""

    @abstractmethod
    def add(self, x_BTC: Tensor, d_BTR: Tensor) -> None:
        """Adds one batch, or, of the same batch, the gradients of another direction."""

    @property
    @abstractmethod
    def sum_RC(self) -> Tensor:
        """Over all samples."""


@final
class Squares(Diagonal):
    """Σ (Σ_t d xᵀ)²: every sample's own gradient, squared."""

    def __init__(self) -> None:
        self._sum = torch.zeros(())

    def add(self, x_BTC: Tensor, d_BTR: Tensor) -> None:
        self._sum = self._sum.to(x_BTC.device) + _squared(x_BTC, d_BTR)

    @property
    def sum_RC(self) -> Tensor:
        return self._sum


def _squared(x_BTC: Tensor, d_BTR: Tensor) -> Tensor:
    if x_BTC.shape[1] == 1:  # (d_r x_c)² = d_r² x_c²: no gradient of a sample is ever laid out
        return d_BTR[:, 0].square().T @ x_BTC[:, 0].square()
    return torch.einsum("btr,btc->brc", d_BTR, x_BTC).square().sum(0)


@final
class Kronecker(Diagonal):
    """Σ d² ⊗ E[x²]: the diagonal of the Kronecker-factored approximation (K-FAC, Martens & Grosse 2015), which takes
    inputs and output gradients for independent, and tokens too.
    """

    def __init__(self) -> None:
        self._d2, self._x2 = torch.zeros(()), torch.zeros(())
        self._tokens = 0

    def add(self, x_BTC: Tensor, d_BTR: Tensor) -> None:
        self._d2 = self._d2.to(d_BTR.device) + d_BTR.square().sum((0, 1))
        self._x2 = self._x2.to(x_BTC.device) + x_BTC.square().sum((0, 1))
        self._tokens += x_BTC.shape[0] * x_BTC.shape[1]

    @property
    def sum_RC(self) -> Tensor:
        return torch.outer(self._d2, self._x2 / self._tokens)


def empirical(z_BK: Tensor, asked: Tensor, loss: Loss) -> Sequence[Tensor]:
    """The gradient of each sample's loss at its logits [B, K]: squared further down it gives the empirical Fisher."""
    with torch.enable_grad():
        z_BK = z_BK.detach().requires_grad_()
        return [torch.autograd.grad(loss(z_BK, asked) * len(z_BK), z_BK)[0]]


def gauss_newton(z_BK: Tensor, asked: Tensor, loss: Loss) -> Sequence[Tensor]:
    """K vectors a sample [B, K] whose outer products add up to the Hessian of its loss at its logits: squared further
    down and summed they give the Gauss–Newton diagonal, for cross-entropy the Fisher of the model's own distribution.

    With units that are linear in pieces, such as ReLU, the diagonal of the Hessian itself (Schraudolph 2002): no path
    goes through one weight twice.
    """

    def own(z_K: Tensor, y: Tensor) -> Tensor:
        return loss(z_K[None], y[None])

    # float64: of a network that is sure of itself the Hessian is nearly zero, and eigh fails on it in float32
    hessian_BKK = torch.func.vmap(torch.func.hessian(own))(z_BK.detach().double(), asked)
    values_BK, vectors_BKK = torch.linalg.eigh(hessian_BKK)
    roots_BKK = vectors_BKK * values_BK.clamp_min(0).sqrt()[:, None, :]
    return list(roots_BKK.to(z_BK.dtype).unbind(2))
