"""Wanda (Sun et al., ICLR 2024): score |w|·‖x‖, no weight update. It sees the diagonal of H alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.solvers.base import Solver, State


@final
@dataclass(frozen=True)
class Wanda(Solver[State]):
    """Score |w_rc|·√H_cc (their equation 1). Published per row: the recipe chooses that pattern for it."""

    workspace = (0, 4)

    def prepare(self, gram: Gram) -> State:
        return State(gram, damping=0.0)

    def search(self, W_RC: Tensor, state: State, pattern: Pattern) -> tuple[Tensor, Tensor]:
        return W_RC, pattern.keep(W_RC.abs() * state.H_CC.diagonal().sqrt())
