"""What calibration tells about the inputs of a matrix: sums, each with a count.

A statistic is a plain sum over tokens, so batch order, batch size, number of ranks and restarts cannot change its
meaning.

Legend: x_TC inputs (T tokens, C columns); H_CC = Σ x xᵀ; y_TR another quantity of the same tokens; K_RC = Σ y xᵀ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from obsprune.core.products import add_cross, add_gram

SUM = torch.float32
"""What sums are kept in. All mathematics of the solvers follows; float64 is for comparison."""


class Statistic(ABC):
    """A sum over tokens; `count` is the number of them."""

    count: int

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves: what an all-reduce and a run directory see."""


@final
class Gram(Statistic):
    """H = Σ x xᵀ in at least float32 [C, C]: the Hessian of the layer problem (SparseGPT, section 3.1), unscaled; and
    Σ x [C], for the mean.

    Inputs may be bf16 or fp16, which a GPU multiplies as they are; the sum never is (accumulating in bf16 costs 2e-3
    relative error).
    `name` says whose inputs these are, for messages.
    """

    def __init__(self, columns: int, name: str = "a matrix", device: torch.device | str = "cpu") -> None:
        self.name, self.count = name, 0
        self.H_CC = torch.zeros(columns, columns, dtype=SUM, device=device)
        self.sum_C = torch.zeros(columns, dtype=SUM, device=device)

    def add(self, x_TC: Tensor) -> None:
        """Adds the tokens of one batch."""
        add_gram(self.H_CC, self.sum_C, x_TC)
        self.count += x_TC.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"H": self.H_CC, "sum": self.sum_C}

    @property
    def mean_C(self) -> Tensor:
        """The mean input μ [C]."""
        return self.sum_C / max(self.count, 1)

    def double(self) -> Gram:
        """The same sums in float64."""
        return Gram.of(self.H_CC.double(), self.count, self.name, self.sum_C.double())

    def centred(self) -> Gram:
        """Σ (x − μ)(x − μ)ᵀ = H − N μ μᵀ, subtracted in float64; its mean is zero. An input that never varies, up to
        rounding, is dead in it.
        """
        H_CC, sum_C = self.H_CC.double(), self.sum_C.double()
        left_CC = H_CC - sum_C[:, None] * sum_C / max(self.count, 1)
        dead_C = left_CC.diagonal() <= torch.finfo(torch.float32).eps * H_CC.diagonal()
        left_CC.masked_fill_(dead_C | dead_C[:, None], 0)
        return Gram.of(left_CC.to(self.H_CC.dtype), self.count, self.name)

    @classmethod
    def of(cls, H_CC: Tensor, count: int, name: str = "a matrix", sum_C: Tensor | None = None) -> Gram:
        """Sums made elsewhere; without `sum_C` of inputs with mean zero."""
        gram = cls(0, name)
        gram.H_CC, gram.count = H_CC, count
        gram.sum_C = H_CC.new_zeros(len(H_CC)) if sum_C is None else sum_C
        return gram


@final
class Cross(Statistic):
    """K = Σ y xᵀ in float32 [R, C]: of the inputs of one layer in two models, or of any two things tokens have."""

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.K_RC = torch.zeros(rows, columns, dtype=SUM, device=device)

    def add(self, y_TR: Tensor, x_TC: Tensor) -> None:
        """Adds the tokens of one batch, in both the same ones in the same order."""
        add_cross(self.K_RC, y_TR, x_TC)
        self.count += x_TC.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"K": self.K_RC}
