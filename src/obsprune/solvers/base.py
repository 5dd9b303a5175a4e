"""The one question every solver answers: min over Z of tr (W−Z) H (W−Z)ᵀ, with zeros where a pattern wants them.

Legend: W_RC dense weight (R outputs, C inputs), Z_RC the sparse answer, H_CC Gram of the inputs; keep_RC True =
survives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, final

import torch
from torch import Tensor

from obsprune.core.linalg import layer_loss
from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.errors import InputError


@dataclass(frozen=True)
class State:
    """What a solver prepares once for a Gram, however many matrices share it.

    gram: the sum itself; damping: the damping really used (share of the mean diagonal; 0 where none is needed).
    """

    gram: Gram
    damping: float

    @property
    def H_CC(self) -> Tensor:
        return self.gram.H_CC


@dataclass(frozen=True)
class Solution:
    """The answer for one matrix.

    weight [R, C] in the dtype of the question; keep bool [R, C]; loss = tr (W−Z) H (W−Z)ᵀ of that very weight
    (undamped), H the Gram of the state; damping: the damping really used; bias_shift [R]: what the layer's bias must
    grow by, None where the solver leaves it alone.
    """

    weight: Tensor
    keep: Tensor
    loss: float
    damping: float
    bias_shift: Tensor | None = None


S = TypeVar("S", bound=State)


class Solver(ABC, Generic[S]):
    """A method for the layer problem. A frozen dataclass: its fields are its options, in recipe and CLI alike.

    workspace: what it holds beside the Gram for one matrix: so many squares [C, C], and matrices [R, C], of its dtype;
    by it a run's memory is estimated.
    """

    workspace: ClassVar[tuple[int, int]] = (6, 6)

    @abstractmethod
    def prepare(self, gram: Gram) -> S:
        """The work that depends on the inputs only. Raises NotPositiveDefinite."""

    @abstractmethod
    def search(self, W_RC: Tensor, state: S, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """(Z_RC, keep_RC) in the working dtype. W must not be changed; where keep is False, Z is ignored."""

    def shift(self, D_RC: Tensor, state: S) -> Tensor | None:
        """What the bias must grow by [R] when the weight loses D."""
        return None

    def without_bias(self) -> AnySolver:
        """The solver for layers that have no bias."""
        return self

    @final
    def solve(self, weight: Tensor, state: S, pattern: Pattern) -> Solution:
        """Prunes one matrix. The mathematics runs in the Gram's dtype (float32 or better); one cast back at the end.

        Raises InputError when the pattern cannot rule this shape, or when NaN or infinity came in or out.
        """
        pattern.check(*weight.shape)
        Z_RC, keep_RC = self.search(weight.to(state.H_CC.dtype), state, pattern)
        sparse = Z_RC.where(keep_RC, 0).to(weight.dtype)
        error_RC = weight.to(state.H_CC.dtype) - sparse.to(state.H_CC.dtype)
        loss = layer_loss(error_RC, state.H_CC)
        if not math.isfinite(loss):  # every NaN and infinity of weight, Gram or answer ends up here
            raise InputError(
                f"the layer loss of {state.gram.name} is {loss}: its weight or its calibration inputs hold NaN or "
                f"infinity, or overflow {str(weight.dtype).removeprefix('torch.')}; mend the checkpoint or use float32"
            )
        return Solution(sparse, keep_RC, loss, state.damping, self.shift(error_RC, state))


AnySolver = Solver[Any]


def dead_first(scores_RC: Tensor, dead_C: Tensor) -> Tensor:
    """Scores (none negative) with dead inputs below all others: their weights cost nothing, so they go first within the
    budget. Weights that are zero already come before them, or there would be more zeros than the budget in the end.
    """
    return scores_RC.masked_fill(dead_C, -1.0).masked_fill(scores_RC == 0, -torch.inf)
