"""Values over rows and columns as colours, dark where they are high: a drawing with colours of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

from obsprune.report.drawings import LETTER, WIDTH, Drawing, Scale, spoken

RAMP = ("#fff3c4", "#f2cf63", "#a9c26b", "#4fa58b", "#23748a", "#264d7c", "#1f2450")
"""From low to high: darker with each step, so that it is read without colours, too."""


@final
@dataclass(frozen=True)
class HeatCell:
    """row, column: its place; value; text: in it; label: all that is told of it."""

    row: int
    column: int
    value: float
    text: str
    label: str


@final
@dataclass(frozen=True)
class Square:
    """A cell where it is drawn, its colour, and one for letters on that."""

    x: float
    y: float
    fill: str
    ink: str
    text: str
    label: str


@final
@dataclass(frozen=True)
class HeatMap(Drawing):
    """Values over rows and columns, in colours; places without a value stay empty. corner: what the
    rows are; unit: what the values are; least: the smallest range the colours are stretched over, so that rounding is
    not seen as a difference; log: equal ratios of values are equally many colours apart.
    """

    macro: ClassVar[str] = "heat"
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[HeatCell]
    corner: str
    unit: str
    least: float = 0.0
    log: bool = False
    cell_height: ClassVar[float] = 17.0

    @cached_property
    def left(self) -> float:
        return 10 + LETTER * max((len(row) for row in [*self.rows, self.corner]), default=0)

    @cached_property
    def longest(self) -> int:
        """Letters of the longest name of a column."""
        return max((len(column) for column in self.columns), default=0)

    @cached_property
    def upright(self) -> bool:
        """Whether the columns' names are too long for their columns."""
        return LETTER * self.longest > self.cell_width

    @cached_property
    def top(self) -> float:
        """Room for the columns' names."""
        return 12 + LETTER * self.longest if self.upright else 20.0

    @cached_property
    def cell_width(self) -> float:
        """As wide as there is room for, and never narrower than the number in it."""
        return round(max(40.0, (WIDTH - self.left) / max(len(self.columns), 1)), 2)

    @cached_property
    def width(self) -> float:
        return round(self.left + self.cell_width * len(self.columns) + 2, 2)

    @cached_property
    def height(self) -> float:
        return round(self.top + self.cell_height * len(self.rows) + 44, 2)

    @cached_property
    def shades(self) -> Scale:
        values = [cell.value for cell in self.cells if cell.value > 0 or not self.log]
        low, high = min(values, default=1.0), max(values, default=1.0)
        if high - low < self.least:
            middle = (high + low) / 2
            low, high = middle - self.least / 2, middle + self.least / 2
        return Scale((low, high), (0.0, 1.0), self.log)

    @property
    def squares(self) -> list[Square]:
        return [self._square(cell) for cell in self.cells]

    def _square(self, cell: HeatCell) -> Square:
        low, high = self.shades.values
        fill = shade(self.shades(min(max(cell.value, low), high)))
        x, y = self.left + cell.column * self.cell_width, self.top + cell.row * self.cell_height
        return Square(round(x, 2), round(y, 2), fill, ink(fill), cell.text, cell.label)

    @cached_property
    def legend_width(self) -> float:
        """Of one colour."""
        return round((min(self.width, WIDTH) - 12) / len(RAMP), 2)

    @property
    def legend(self) -> list[Square]:
        """Colours from low to high, with their values at both ends and in the middle."""
        low, high = self.shades.values
        middle = math.sqrt(low * high) if self.log else (low + high) / 2
        texts = {0: spoken(low), 3: spoken(middle), 6: spoken(high)}
        y = self.height - 34
        found = []
        for step in range(len(RAMP)):
            fill = shade(step / (len(RAMP) - 1))
            found.append(Square(round(6 + step * self.legend_width, 2), y, fill, ink(fill), texts.get(step, ""), ""))
        return found


def shade(share: float) -> str:
    """The colour of a share of the way from low to high."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    mixed = (a + (place - first) * (b - a) for a, b in zip(_rgb(RAMP[first]), _rgb(RAMP[first + 1]), strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def ink(fill: str) -> str:
    """Black or white, whichever is read better on a colour: at least 4.5 : 1."""
    return "#000000" if luminance(fill) > 0.179 else "#ffffff"


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    red, green, blue = (part / 255 for part in _rgb(colour))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
