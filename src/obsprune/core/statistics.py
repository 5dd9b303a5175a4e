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


class Statistic(ABC):
    """A sum over tokens; `count` is the number of them."""

    count: int

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves: what an all-reduce and a run directory see."""


@final
class Gram(Statistic):
    """H = Σ x xᵀ in at least float32 [C, C]: the Hessian of the layer problem (SparseGPT, section 3.1), unscaled.

    Inputs may be bf16 or fp16; the sum never is (accumulating in bf16 costs 2e-3 relative error).
    `name` says whose inputs these are, for messages.
    """

    def __init__(self, columns: int, name: str = "a matrix", device: torch.device | str = "cpu") -> None:
        self.name, self.count = name, 0
        self.H_CC = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x_TC: Tensor) -> None:
        """Adds the tokens of one batch."""
        x_TC = x_TC.to(self.H_CC.dtype)
        self.H_CC.addmm_(x_TC.T, x_TC)
        self.count += x_TC.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"H": self.H_CC}

    def double(self) -> Gram:
        """The same sum in float64."""
        return Gram.of(self.H_CC.double(), self.count, self.name)

    @classmethod
    def of(cls, H_CC: Tensor, count: int, name: str = "a matrix") -> Gram:
        """A Gram already summed elsewhere."""
        gram = cls(0, name)
        gram.H_CC, gram.count = H_CC, count
        return gram


@final
class Cross(Statistic):
    """K = Σ y xᵀ in float32 [R, C]: of the inputs of one layer in two models, or of any two things tokens have."""

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.K_RC = torch.zeros(rows, columns, dtype=torch.float32, device=device)

    def add(self, y_TR: Tensor, x_TC: Tensor) -> None:
        """Adds the tokens of one batch, in both the same ones in the same order."""
        self.K_RC.addmm_(y_TR.to(self.K_RC.dtype).T, x_TC.to(self.K_RC.dtype))
        self.count += x_TC.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return {"K": self.K_RC}
