"""Matrices as a picture, depth across and kind down: for the terminal and for pages alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

ONE_OF_MANY = re.compile(r"(?<=experts)\.\d+(?=\.)")
GROUP = re.compile(r"\[\d+\]$")
OTHERS = "all others"


@dataclass(frozen=True)
class Cell:
    """What a place holds. value: the mean over its matrices, each counted as often as it has weights; most, which: the
    largest of theirs, and whose it is; weights, count: of all its matrices.
    """

    value: float
    most: float
    which: str
    weights: int
    count: int = 1

    def __add__(self, other: Cell) -> Cell:
        weights, larger = self.weights + other.weights, max(self, other, key=lambda cell: cell.most)
        value = (self.value * self.weights + other.value * other.weights) / weights
        return Cell(value, larger.most, larger.which, weights, self.count + other.count)


@dataclass(frozen=True)
class Grid:
    """kinds: the rows; depths: the columns; cells: {(kind, depth): cell}, without the places that no matrix has."""

    kinds: tuple[str, ...]
    depths: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]

    def folded(self, most: int) -> Grid:
        """The same in at most so many columns: as many neighbours in each as that needs, `first–last` its name."""
        each = -(-len(self.depths) // most)
        if each <= 1:
            return self
        parts = [self.depths[start : start + each] for start in range(0, len(self.depths), each)]
        label = {depth: part[0] if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts for depth in part}
        return _summed((kind, label[depth], cell) for (kind, depth), cell in self.cells.items())

    def gathered(self, most: int) -> Grid:
        """The same in at most so many rows: those with the most weights, and all others together in the last one."""
        if len(self.kinds) <= most:
            return self
        weights: Counter[str] = Counter()
        for (kind, _), cell in self.cells.items():
            weights[kind] += cell.weights
        kept = {kind for kind, _ in weights.most_common(most - 1)}
        rows = _summed((kind if kind in kept else OTHERS, depth, cell) for (kind, depth), cell in self.cells.items())
        return replace(rows, kinds=(*(kind for kind in rows.kinds if kind != OTHERS), OTHERS))


def kind_of(name: str, block: str) -> str:
    """What a matrix is called inside its block: all experts of a layer alike, and all groups of a convolution."""
    inside = name.removeprefix(block).lstrip(".") or name.rpartition(".")[2]
    return GROUP.sub("", ONE_OF_MANY.sub(".*", inside))


def depths_of(blocks: Iterable[str]) -> dict[str, str]:
    """{block: the numbers in its name, such as 12 or 1.2}; whole names where two blocks have the same numbers."""
    told = {block: ".".join(re.findall(r"(?<![^.])\d+(?![^.])", block)) or block for block in blocks}
    return told if len(set(told.values())) == len(told) else {block: block for block in told}


def make_grid(matrices: Iterable[Mapping[str, Any]], of: str) -> Grid:
    """One value of every matrix, from entries as report.json has them: `block`, `name`, `shape` and the value. What
    has none (null, or no such key) takes no part. Order: that of the entries.
    """
    told = [matrix for matrix in matrices if matrix.get(of) is not None]
    depths = depths_of(matrix["block"] for matrix in told)
    return _summed((kind_of(m["name"], m["block"]), depths[m["block"]], _cell(m, float(m[of]))) for m in told)


def _cell(matrix: Mapping[str, Any], value: float) -> Cell:
    rows, columns = matrix["shape"]
    return Cell(value, value, matrix["name"], rows * columns)


def _summed(parts: Iterable[tuple[str, str, Cell]]) -> Grid:
    """Cells of the same place become one."""
    cells: dict[tuple[str, str], Cell] = {}
    for kind, depth, cell in parts:
        place = kind, depth
        cells[place] = cells[place] + cell if place in cells else cell
    kinds, depths = (tuple(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1))
    return Grid(kinds, depths, cells)
