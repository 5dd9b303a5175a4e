"""A heat map for the terminal: depth across, kind down, one character a place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from obsprune.errors import printable
from obsprune.report.grid import Cell, Grid, make_grid

LABEL, KINDS = 32, 24
"""Characters of a kind's name and rows of a map, at most."""
ALIKE = 1e-3
"""Values that differ by less of the largest one are the same."""


def heat_maps(matrices: list[dict[str, Any]]) -> list[Heat]:
    """Where the zeros are, and where the errors, of what has any."""
    grids = Heat("sparsity", make_grid(matrices, "sparsity")), Heat("error", make_grid(matrices, "error"), True)
    return [heat for heat in grids if heat.grid.cells]


@dataclass(frozen=True)
class Palette:
    """Characters from low to high, their colours (of the 256 that terminals number), and one for no matrix at all."""

    marks: str
    absent: str
    colours: tuple[int, ...] = ()

    def mark(self, level: int) -> Text:
        return Text(self.marks[level], style=Style(color=f"color({self.colours[level]})") if self.colours else "")


COLOURED = Palette("▁▂▃▄▅▆▇█", "·", (25, 31, 37, 71, 143, 178, 208, 196))
"""From blue to red, to be seen on black and on white."""
PLAIN = Palette("0123456789", ".")


@dataclass(frozen=True)
class Scale:
    """Values from low to high; `by_factors`: in equal steps of their logarithm."""

    low: float
    high: float
    by_factors: bool = False

    @classmethod
    def over(cls, cells: list[Cell], by_factors: bool) -> Scale:
        values = [c.value for c in cells if math.isfinite(c.value) and (c.value > 0 or not by_factors)] or [0.0]
        return cls(min(values), max(values), by_factors)

    @property
    def flat(self) -> bool:
        """Whether all values are the same."""
        return self.high - self.low <= ALIKE * abs(self.high)

    @property
    def ends(self) -> tuple[float, ...]:
        """The lowest and the highest value."""
        return (self.low,) if self.flat else (self.low, self.high)

    def level(self, value: float, levels: int) -> int:
        """Which of so many; the highest for what is no number."""
        way = self._way(value) if math.isfinite(value) else 1.0
        return min(int(levels * max(way, 0.0)), levels - 1)

    def _way(self, value: float) -> float:
        """How far from low to high; of values that are all the same, which are shares, how far from none to all."""
        if self.flat:
            return value
        if not self.by_factors:
            return (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else 0.0


@dataclass(frozen=True)
class Heat:
    """A grid as wide as the terminal, with its legend: blocks in colour where the terminal has colours, else digits."""

    title: str
    grid: Grid
    by_factors: bool = False
    form: str = ".4f"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = self.grid.gathered(KINDS)
        label = min(max(len(kind) for kind in grid.kinds), LABEL, options.max_width // 2)
        room = options.max_width - label - 2
        folded = grid.folded(room)
        gap = " " if 2 * len(folded.depths) <= room else ""
        colours = bool(console.color_system) and not console.no_color and not options.ascii_only
        palette = COLOURED if colours else PLAIN
        scale = Scale.over(list(folded.cells.values()), self.by_factors)
        yield Text(f"{self.title}, depth across{_notes(grid, folded, palette)}", style="bold", no_wrap=True)
        yield Text(" " * (label + 2) + _ticks(folded.depths, 1 + len(gap)), style="dim", no_wrap=True)
        for kind in folded.kinds:
            marks = (_mark(folded.cells.get((kind, depth)), scale, palette) for depth in folded.depths)
            yield Text.assemble(f"{shortened(printable(kind), label):{label}}  ", Text(gap).join(marks), no_wrap=True)
        yield Text(self._legend(scale, palette), style="dim")

    def _legend(self, scale: Scale, palette: Palette) -> str:
        """What the lowest and the highest mark mean, and the largest value of a matrix."""
        levels = len(palette.marks)
        ends = (f"{palette.marks[scale.level(value, levels)]} {value:{self.form}}" for value in scale.ends)
        told = [" to ".join(ends) + (" (logarithmic)" if self.by_factors and not scale.flat else "")]
        if not scale.flat:
            worst = max(self.grid.cells.values(), key=lambda cell: cell.most)
            told.append(f"most {worst.most:{self.form}}: {printable(worst.which)}")
        return "; ".join(told)


def _mark(cell: Cell | None, scale: Scale, palette: Palette) -> Text:
    return palette.mark(scale.level(cell.value, len(palette.marks))) if cell else Text(palette.absent, style="dim")


def _notes(grid: Grid, folded: Grid, palette: Palette) -> str:
    """How many depths are one column, and what stands where nothing is."""
    each = -(-len(grid.depths) // len(folded.depths))
    absent = len(folded.cells) < len(folded.kinds) * len(folded.depths)
    notes = [f"{each} in each column"] * (each > 1) + [f"{palette.absent} no matrix"] * absent
    return f" ({'; '.join(notes)})" if notes else ""


def _ticks(depths: tuple[str, ...], width: int) -> str:
    """Names of columns over their first character, as many as there is room for."""
    line = ""
    for index, depth in enumerate(depths):
        if len(line) <= index * width:
            line = f"{line:<{index * width}}{printable(depth.partition('–')[0])} "
    return line.rstrip()


def shortened(name: str, most: int) -> str:
    """Without its middle where it is too long."""
    if cell_len(name) <= most:
        return name
    end = (most - 2) * 2 // 3
    return f"{name[: most - 2 - end]}..{name[-end:]}"
