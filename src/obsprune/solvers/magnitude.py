"""Magnitude pruning: the smallest |w| go, the others stay as they are (H = I)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.solvers.base import Solver, State


@final
@dataclass(frozen=True)
class Magnitude(Solver[State]):
    """Score |w|. Looks at no data; the Gram only measures the loss."""

    workspace = (0, 3)

    def prepare(self, gram: Gram) -> State:
        return State(gram, damping=0.0)

    def search(self, W_RC: Tensor, state: State, pattern: Pattern) -> tuple[Tensor, Tensor]:
        return W_RC, pattern.keep(W_RC.abs())
