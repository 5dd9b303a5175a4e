"""Pictures of a page as plain values, every number in them placed; templates/drawings.html.j2 writes them as SVG.

All are drawn as wide as a telephone (WIDTH units of a pixel) and scaled up, so that their letters are never too small.
Colours are the page's (light and dark).
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, final

from obsprune.report import labels

WIDTH = 380.0
SHAPES = "●■▲◆"
"""Of points, series by series; the templates draw them."""
LETTER = 6.4
"""Units a letter of 11 units is wide."""
Span = tuple[float, float]
Format = Callable[[float], str]


def spoken(value: float) -> str:
    """A number in a picture: four digits at most."""
    return f"{value:.4g}"


@final
@dataclass(frozen=True)
class Tick:
    """A value of an axis: where it is, and what is written there."""

    place: float
    label: str


@final
@dataclass(frozen=True)
class Scale:
    """Values onto places. values, places: first and last of them; log: equal ratios are equally far apart."""

    values: Span
    places: Span
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = map(self._bent, self.values)
        share = (self._bent(value) - low) / (high - low) if high > low else 0.5
        first, last = self.places
        return round(first + share * (last - first), 2)

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, count: int = 5) -> list[Tick]:
        """About so many round values."""
        return [Tick(self(value), spoken(value)) for value in _round_values(self.values, count, self.log)]


def _round_values(values: Span, count: int, log: bool) -> list[float]:
    low, high = values
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        inside = [value for value in found if low <= value <= high]
        return inside if len(inside) <= 2 * count else [v for v in inside if f"{v:e}".startswith("1.000000e")]
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [place * step for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def span(values: Iterable[float], margin: float = 0.06) -> Span:
    """Lowest and highest of some values, and a little room around them; equal ones are given some."""
    found = list(values)
    low, high = min(found, default=0.0), max(found, default=1.0)
    room = margin * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


@dataclass(frozen=True)
class Drawing(ABC):
    """name: of the page's element, in plain letters; title, tells: what is seen, in a line and in sentences, for those
    who do not see it.
    """

    macro: ClassVar[str]
    name: str
    title: str
    tells: str

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Its legend, below it: what is drawn, and what it means."""
        return []


@final
@dataclass(frozen=True)
class Point:
    """x, y: values; label: what is told of it; star: the best one; shown: the label is written beside it."""

    x: float
    y: float
    label: str = ""
    star: bool = False
    shown: bool = False


@final
@dataclass(frozen=True)
class Placed:
    """A point where it is drawn. written: where its label goes, if it is written."""

    x: float
    y: float
    label: str
    star: bool
    written: labels.Label | None


@final
@dataclass(frozen=True)
class Series:
    """Points of one colour and shape, in order, and whether a line joins them."""

    name: str
    points: Sequence[Point]
    joined: bool = True

    @property
    def is_line(self) -> bool:
        """Whether there are points to join."""
        return self.joined and len(self.points) > 1


@final
@dataclass(frozen=True)
class Chart(Drawing):
    """Lines and points between two axes. levels: {what it is: a height that is drawn all across}; log_x, log_y: equal
    ratios are equally far apart; whole: x are numbers of things, such as rounds.
    """

    macro: ClassVar[str] = "chart"
    x: str
    y: str
    series: Sequence[Series]
    levels: Mapping[str, float] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    whole: bool = False
    height: float = 240.0
    width: float = WIDTH
    top: ClassVar[float] = 14.0
    left: ClassVar[float] = 56.0
    right: ClassVar[float] = 14.0

    @property
    def bottom(self) -> float:
        """Where the horizontal axis is."""
        return self.height - 40.0

    @cached_property
    def across(self) -> Scale:
        values = [point.x for one in self.series for point in one.points]
        return Scale(_wide(values, self.log_x), (self.left, self.width - self.right), self.log_x)

    @cached_property
    def up(self) -> Scale:
        values = [point.y for one in self.series for point in one.points] + list(self.levels.values())
        return Scale(_wide(values, self.log_y), (self.bottom, self.top), self.log_y)

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Of each series, where there are several."""
        marks = [SHAPES[number % len(SHAPES)] for number in range(len(self.series))]
        named = zip(marks, self.series, strict=True)
        return [(f"—{mark}—" if one.is_line else mark, one.name) for mark, one in named if len(marks) > 1]

    @property
    def ticks_x(self) -> list[Tick]:
        ticks = self.across.ticks()
        return [tick for tick in ticks if not self.whole or "." not in tick.label]

    @property
    def ticks_y(self) -> list[Tick]:
        return self.up.ticks()

    @property
    def lines(self) -> list[Tick]:
        """The levels, each at its height."""
        return [Tick(self.up(value), f"{name} {spoken(value)}") for name, value in self.levels.items()]

    @cached_property
    def layout(self) -> list[list[Placed]]:
        """The points of each series where they are drawn, and their labels."""
        points = [point for one in self.series for point in one.points]
        places = [(self.across(point.x), self.up(point.y)) for point in points]
        widths = [LETTER * len(point.label) if point.shown else 0.0 for point in points]
        levels = [
            labels.Box(self.width - LETTER * len(tick.label), tick.place - 14, self.width, tick.place)
            for tick in self.lines
        ]
        room = labels.Box(self.left, 0.0, self.width, self.bottom - 2)
        found = zip(points, places, labels.place(places, widths, room, levels), strict=True)
        placed = (Placed(x, y, p.label, p.star, label if p.shown else None) for p, (x, y), label in found)
        return [[next(placed) for _ in one.points] for one in self.series]


def _wide(values: Sequence[float], log: bool) -> Span:
    if not log:
        return span(values)
    low, high = span(map(math.log10, values))
    return 10**low, 10**high


@final
@dataclass(frozen=True)
class Bar:
    """One bar: its name, its value, what is written at its end, and where it ends."""

    name: str
    value: float
    label: str


@final
@dataclass(frozen=True)
class Bars(Drawing):
    """Lengths below each other, each under its name."""

    macro: ClassVar[str] = "bars"
    bars: Sequence[Bar]
    width: float = WIDTH
    row: ClassVar[float] = 36.0

    @property
    def height(self) -> float:
        return self.row * len(self.bars) + 4

    def length(self, bar: Bar) -> float:
        most = max((one.value for one in self.bars), default=0.0)
        return round(bar.value / most * self.width, 2) if most else 0.0


@final
@dataclass(frozen=True)
class Interval:
    """Lowest, middle and highest of something; marked: it is to be seen that something is wrong."""

    name: str
    low: float
    middle: float
    high: float
    label: str
    marked: bool = False


@final
@dataclass(frozen=True)
class Intervals(Drawing):
    """From where to where, below each other, on one logarithmic axis that begins with zero. level: a value to compare
    with, and what it is.
    """

    macro: ClassVar[str] = "intervals"
    intervals: Sequence[Interval]
    x: str
    level: tuple[str, float] | None = None
    width: float = WIDTH
    row: ClassVar[float] = 18.0
    top: ClassVar[float] = 18.0

    @cached_property
    def left(self) -> float:
        return 10 + LETTER * max((len(one.name) for one in self.intervals), default=0)

    @property
    def bottom(self) -> float:
        return self.top + self.row * len(self.intervals)

    @property
    def height(self) -> float:
        return self.bottom + 40

    @cached_property
    def across(self) -> Scale:
        most = max([one.high for one in self.intervals] + ([self.level[1]] if self.level else []), default=1.0)
        return Scale((1.0, most + 2.0), (self.left + 6, self.width - 12), log=True)

    def at(self, value: float) -> float:
        """Where a value is; zero is where the axis begins."""
        return self.across(value + 1.0)

    @property
    def ticks(self) -> list[Tick]:
        powers = [10**power for power in range(12) if 10**power <= self.across.values[1]]
        every = max(1, math.ceil(len(powers) / 5))
        return [Tick(self.at(0), "0"), *(Tick(self.at(value), f"{value:,}") for value in powers[every - 1 :: every])]
