"""Who of several processes solves which matrix, and whose sums are added up for whom."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from obsprune.core.statistics import Statistic
from obsprune.models.matrices import Matrix
from obsprune.ranks import Ranks, deal


@dataclass(frozen=True)
class Deal:
    """The rank that solves each matrix, by name."""

    ranks: Ranks
    owner: dict[str, int]

    @classmethod
    def of(cls, matrices: Sequence[Matrix], ranks: Ranks) -> Deal:
        """By cost: C³ for the factorisation, R C² for the sweep."""
        shapes = [matrix.shape for matrix in matrices]
        owners = deal([columns**2 * (columns + rows) for rows, columns in shapes], ranks.size)
        return cls(ranks, dict(zip((matrix.name for matrix in matrices), owners, strict=True)))

    def own(self, matrices: Iterable[Matrix]) -> list[Matrix]:
        """Those that this process solves."""
        return [matrix for matrix in matrices if self.owner[matrix.name] == self.ranks.rank]

    def owners(self, matrices: Iterable[Matrix]) -> set[int]:
        """All who solve some of these."""
        return {self.owner[matrix.name] for matrix in matrices}


def add_up(ranks: Ranks, sums: Iterable[tuple[Statistic, Collection[int]]]) -> None:
    """Adds up statistics over all processes, each for those named (nobody named: for all); their counts for all."""
    pairs = list(sums)
    counts = torch.tensor([statistic.count for statistic, _ in pairs], dtype=torch.int64)
    ranks.sum([counts])
    for (statistic, owners), count in zip(pairs, counts.tolist(), strict=True):
        ranks.sum(list(statistic.tensors().values()), owners)
        statistic.count = count


def total(ranks: Ranks, values: Sequence[float]) -> list[float]:
    """Sums over all processes, number by number."""
    sums = torch.tensor(values, dtype=torch.float64)
    ranks.sum([sums])
    found: list[float] = sums.tolist()
    return found
