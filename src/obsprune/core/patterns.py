"""Which weights may survive: a pattern turns scores into a keep mask.

Legend: R rows (outputs), C columns (inputs); scores_RC is high where a weight matters; keep_RC is True where it
survives.

A solver never asks which pattern it has. It asks for the part of the pattern that rules a tile of columns (`tile`),
and for the mask (`keep`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import final

import torch
from torch import Tensor

from obsprune.core.selection import kth_lowest
from obsprune.errors import InputError

FEW = 16
"""Scores of which it takes less time to compare each with each than to select."""
SMALL = 2**15
"""Scores so few that the number of operations takes the time, not their size."""


class Pattern(ABC):
    """A rule that a keep mask obeys."""

    group: int | None = None
    """Columns that must be judged together (m of n:m); None leaves the width of a tile to the solver."""

    @abstractmethod
    def keep(self, scores_RC: Tensor) -> Tensor:
        """The mask of the best weights under the rule: bool [R, C], True = survives. Ties prune the lowest index."""

    @abstractmethod
    def tile(self, rows: int, start: int, stop: int) -> Pattern:
        """The rule for columns start…stop alone, with their share of the matrix's budget (cumulative rounding)."""

    @abstractmethod
    def may_prune(self, keep_RC: Tensor, rows: slice = slice(None)) -> Tensor:
        """Which survivors may go next when one weight after the other is removed: bool [R, C].

        keep_RC: what survives so far, all columns of these `rows` of the matrix.
        """

    @abstractmethod
    def pruned(self, rows: int, columns: int) -> int:
        """How many weights of a [rows, columns] matrix the rule prunes, exactly."""

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """Raises InputError when a [rows, columns] matrix cannot obey the rule."""


def prune_lowest(scores_RC: Tensor, count: int) -> Tensor:
    """Keep mask that drops exactly the `count` lowest scores of each row; ties go by index, lowest first.

    A selection of the count-th value instead of a sort: linear in the number of scores.
    """
    if count == 0:
        return torch.ones_like(scores_RC, dtype=torch.bool)
    return _dropped(scores_RC, scores_RC.kthvalue(count, dim=-1, keepdim=True).values, count)


def _dropped(scores_RC: Tensor, threshold_R1: Tensor, count: int) -> Tensor:
    """The mask, given the count-th lowest of each row."""
    below_RC, equal_RC = scores_RC < threshold_R1, scores_RC == threshold_R1
    missing_R1 = count - below_RC.sum(-1, keepdim=True)
    return ~(below_RC | (equal_RC & (equal_RC.cumsum(-1) <= missing_R1)))


def _check_share(sparsity: float) -> None:
    """Raises InputError unless 0 ≤ sparsity ≤ 1."""
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity is the share of weights to prune, between 0 and 1, and this is {sparsity:g}")


@final
@dataclass(frozen=True)
class Lowest(Pattern):
    """Exactly `count` weights of the whole matrix or tile are pruned, wherever they are."""

    count: int

    def keep(self, scores_RC: Tensor) -> Tensor:
        if self.count == 0:
            return torch.ones_like(scores_RC, dtype=torch.bool)
        threshold = kth_lowest(scores_RC, self.count)
        keep_RC = scores_RC > threshold
        if int(keep_RC.sum()) + self.count == keep_RC.numel():
            return keep_RC
        return _dropped(scores_RC.reshape(1, -1), threshold, self.count).view_as(scores_RC)  # ties, by index

    def tile(self, rows: int, start: int, stop: int) -> Pattern:
        raise TypeError("a tile has no tiles")

    def may_prune(self, keep_RC: Tensor, rows: slice = slice(None)) -> Tensor:
        return keep_RC

    def pruned(self, rows: int, columns: int) -> int:
        return self.count

    def check(self, rows: int, columns: int) -> None:
        if not 0 <= self.count <= rows * columns:
            raise InputError(f"cannot prune {self.count} of {rows * columns} weights")


@final
@dataclass(frozen=True)
class LowestPerRow(Pattern):
    """Exactly `count` weights of every row are pruned."""

    count: int

    def keep(self, scores_RC: Tensor) -> Tensor:
        return prune_lowest(scores_RC, self.count)

    def tile(self, rows: int, start: int, stop: int) -> Pattern:
        raise TypeError("a tile has no tiles")

    def may_prune(self, keep_RC: Tensor, rows: slice = slice(None)) -> Tensor:
        return keep_RC & ((~keep_RC).sum(1, keepdim=True) < self.count)

    def pruned(self, rows: int, columns: int) -> int:
        return self.count * rows

    def check(self, rows: int, columns: int) -> None:
        if not 0 <= self.count <= columns:
            raise InputError(f"cannot prune {self.count} of {columns} weights in a row")


@final
@dataclass(frozen=True)
class Unstructured(Pattern):
    """A share `sparsity` of the whole matrix: exactly round(sparsity·R·C) zeros."""

    sparsity: float

    def __post_init__(self) -> None:
        _check_share(self.sparsity)

    def keep(self, scores_RC: Tensor) -> Tensor:
        return Lowest(self.pruned(*scores_RC.shape)).keep(scores_RC)

    def tile(self, rows: int, start: int, stop: int) -> Pattern:
        return Lowest(self.pruned(rows, stop) - self.pruned(rows, start))

    def may_prune(self, keep_RC: Tensor, rows: slice = slice(None)) -> Tensor:
        return keep_RC

    def pruned(self, rows: int, columns: int) -> int:
        return round(self.sparsity * rows * columns)

    def check(self, rows: int, columns: int) -> None: ...


@final
@dataclass(frozen=True)
class PerRow(Pattern):
    """A share `sparsity` of every row: exactly round(sparsity·C) zeros in each."""

    sparsity: float

    def __post_init__(self) -> None:
        _check_share(self.sparsity)

    def keep(self, scores_RC: Tensor) -> Tensor:
        return LowestPerRow(self._of(scores_RC.shape[1])).keep(scores_RC)

    def tile(self, rows: int, start: int, stop: int) -> Pattern:
        return LowestPerRow(self._of(stop) - self._of(start))

    def may_prune(self, keep_RC: Tensor, rows: slice = slice(None)) -> Tensor:
        return LowestPerRow(self._of(keep_RC.shape[1])).may_prune(keep_RC)

    def pruned(self, rows: int, columns: int) -> int:
        return rows * self._of(columns)

    def check(self, rows: int, columns: int) -> None: ...

    def _of(self, columns: int) -> int:
        return round(self.sparsity * columns)


def _best_by_pairs(scores_MG: Tensor, goes: int) -> Tensor:
    """All but the `goes` lowest of each group [M, G]: those that as many go before, the first of equal ones."""
    before_MG = torch.zeros_like(scores_MG, dtype=torch.int16)
    for i, j in combinations(range(len(scores_MG)), 2):
        i_first_G = scores_MG[i] <= scores_MG[j]
        before_MG[j] += i_first_G
        before_MG[i] += ~i_first_G
    return before_MG >= goes


def _best_at_once(scores_MG: Tensor, goes: int) -> Tensor:
    """The same in a handful of operations, of which each pair is a row."""
    i_P, j_P, sign_MP, enough_M1 = _pairs(len(scores_MG), goes, scores_MG.device)
    i_PG, j_PG = scores_MG.index_select(0, i_P), scores_MG.index_select(0, j_P)
    i_first_PG = torch.le(i_PG, j_PG, out=torch.empty_like(i_PG, dtype=torch.float32))
    return sign_MP @ i_first_PG >= enough_M1


@lru_cache
def _pairs(m: int, goes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All i < j below m; +1 where a pair in which i goes first counts for its j, −1 where it counts against its i; the
    sum of these from which on `goes` others go first.
    """
    i_P, j_P = torch.triu_indices(m, m, 1, device=device)
    place_M1 = torch.arange(m, device=device)[:, None]
    return i_P, j_P, (place_M1 == j_P).float() - (place_M1 == i_P).float(), goes - (m - 1 - place_M1).float()


@final
@dataclass(frozen=True)
class NofM(Pattern):
    """n KEPT of every m consecutive inputs of a row (2:4, 4:8, …)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 <= self.n <= self.m:
            raise InputError(f"{self.n}:{self.m} keeps {self.n} of every {self.m} weights; n must lie between 0 and m")

    @property
    def group(self) -> int:  # type: ignore[override]
        return self.m

    def keep(self, scores_RC: Tensor) -> Tensor:
        groups_GM = scores_RC.reshape(-1, self.m)
        if self.m > FEW:
            return prune_lowest(groups_GM, self.m - self.n).view_as(scores_RC)
        best = _best_at_once if groups_GM.numel() <= SMALL else _best_by_pairs
        return best(groups_GM.T, self.m - self.n).T.reshape(scores_RC.shape)

    def tile(self, rows: int, start: int, stop: int) -> Pattern:
        return self

    def may_prune(self, keep_RC: Tensor, rows: slice = slice(None)) -> Tensor:
        groups = keep_RC.reshape(-1, self.m)
        return (groups & (groups.sum(1, keepdim=True) > self.n)).view_as(keep_RC)

    def pruned(self, rows: int, columns: int) -> int:
        return rows * columns // self.m * (self.m - self.n)

    def check(self, rows: int, columns: int) -> None:
        if columns % self.m:
            raise InputError(
                f"{self.n}:{self.m} needs an input width that {self.m} divides, and this one has {columns} columns; "
                f"skip it (--skip REGEX) or use --pattern unstructured"
            )


@final
@dataclass(frozen=True, eq=False)
class Given(Pattern):
    """The mask itself: bool [R, C]."""

    mask_RC: Tensor

    def keep(self, scores_RC: Tensor) -> Tensor:
        return self.mask_RC

    def tile(self, rows: int, start: int, stop: int) -> Pattern:
        return Given(self.mask_RC[:, start:stop])

    def may_prune(self, keep_RC: Tensor, rows: slice = slice(None)) -> Tensor:
        return keep_RC & ~self.mask_RC[rows]

    def pruned(self, rows: int, columns: int) -> int:
        return int((~self.mask_RC).sum())

    def check(self, rows: int, columns: int) -> None:
        if tuple(self.mask_RC.shape) != (rows, columns):
            raise InputError(f"the mask is {tuple(self.mask_RC.shape)} and the matrix {(rows, columns)}")
