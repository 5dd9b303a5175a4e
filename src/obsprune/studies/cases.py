"""The cases of the MONK's problems (Thrun et al., 1991): six attributes, a rule a problem, and what is trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from obsprune.studies.material import MONKS_VALUES, Material

Cases = tuple[Tensor, Tensor]
"""Attributes [N, 6] and whether the rule is said to hold [N]."""
Holds = Callable[[Tensor], Tensor]

INPUTS = [f"a{attribute}={value}" for attribute, values in enumerate(MONKS_VALUES, 1) for value in range(1, values + 1)]


def all_cases() -> Tensor:
    """The 432 cases [432, 6]."""
    return torch.cartesian_prod(*(torch.arange(1, values + 1) for values in MONKS_VALUES))


def encoded(cases: Tensor) -> Tensor:
    """One input of 0 or 1 for each value of each attribute [N, 17]."""
    parts = [one_hot(cases[:, i] - 1, values) for i, values in enumerate(MONKS_VALUES)]
    return torch.cat(parts, 1).double()


class Training(ABC):
    """Where training cases come from."""

    @abstractmethod
    def cases(self, holds: Holds, material: Material, seed: int) -> Cases:
        """Those of one net. Raises InputError when data is missing."""

    @abstractmethod
    def told(self, material: Material) -> str:
        """What they are."""


@final
@dataclass(frozen=True)
class MonkOne(Training):
    """The published ones of the first problem, the same for every net."""

    def cases(self, holds: Holds, material: Material, seed: int) -> Cases:
        data = material.monk1()
        return data.x, data.y

    def told(self, material: Material) -> str:
        return material.monk1().told


@final
@dataclass(frozen=True)
class Drawn(Training):
    """So many drawn without repetition by a generator of each net's own, a share of their labels flipped."""

    number: int
    flipped: float = 0.0

    def cases(self, holds: Holds, material: Material, seed: int) -> Cases:
        random = torch.Generator().manual_seed(seed)
        cases = all_cases()[torch.randperm(432, generator=random)[: self.number]]
        labels = holds(cases)
        wrong = torch.randperm(self.number, generator=random)[: round(self.flipped * self.number)]
        labels[wrong] = ~labels[wrong]
        return cases, labels

    def told(self, material: Material) -> str:
        return f"by the problem's rule: {self.number} of the 432 cases drawn to train on, a net its own"


@dataclass(frozen=True)
class Problem:
    """What is asked of the attributes [N, 6], and what is trained on."""

    holds: Holds
    training: Training


PROBLEMS = {
    1: Problem(lambda a: (a[:, 0] == a[:, 1]) | (a[:, 4] == 1), MonkOne()),
    2: Problem(lambda a: (a == 1).sum(1) == 2, Drawn(169)),
    3: Problem(
        lambda a: ((a[:, 4] == 3) & (a[:, 3] == 1)) | ((a[:, 4] != 4) & (a[:, 1] != 3)), Drawn(122, flipped=0.05)
    ),
}
