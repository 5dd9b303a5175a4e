"""Where the labels of points go: beside them, and never on one another while there is room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LINE = 12.0
"""Units a label is high."""
NEAR = (
    (8.0, -7.0, "start"), (-8.0, -7.0, "end"), (8.0, 14.0, "start"), (-8.0, 14.0, "end"),
    (0.0, -11.0, "middle"), (0.0, 19.0, "middle"),
)  # fmt: skip
"""Places around a point, the best first: how far the label is from it, and which part of it is there."""
ROWS = tuple(LINE * row for row in (0, -1, 1, -2, 2, -3, 3, -4, 4))
"""The same further up and down, where those are taken."""


@dataclass(frozen=True)
class Box:
    """A rectangle; up is less."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether a part of it is in the other one."""
        across = min(self.right, other.right) - max(self.left, other.left)
        return across > 0 and min(self.bottom, other.bottom) > max(self.top, other.top)

    def holds(self, other: Box) -> bool:
        """Whether all of the other one is in it."""
        inside = self.left <= other.left and other.right <= self.right
        return inside and self.top <= other.top and other.bottom <= self.bottom


@dataclass(frozen=True)
class Label:
    """Where a text begins, ends or has its middle (`anchor`, as SVG calls it): x, and y of its base line."""

    x: float
    y: float
    anchor: str


def place(
    points: Sequence[tuple[float, float]], widths: Sequence[float], room: Box, taken: Iterable[Box] = ()
) -> list[Label]:
    """A label for each point, in their order: the first place that is free, inside the room, not on a point and not on
    what is taken; where there is none, the first one inside the room.
    """
    marks = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    full = [*taken, *marks]
    found = []
    for (x, y), width in zip(points, widths, strict=True):
        inside = [(label, box) for label, box in _candidates(x, y, width) if room.holds(box)]
        free = [one for one in inside if not any(one[1].meets(box) for box in full)]
        label, box = next(iter(free or inside or _candidates(x, y, width)))
        found.append(label)
        full.append(box)
    return found


def _candidates(x: float, y: float, width: float) -> Iterator[tuple[Label, Box]]:
    before = {"start": 0.0, "middle": 0.5, "end": 1.0}
    for row in ROWS:
        for dx, dy, anchor in NEAR:
            label = Label(round(x + dx, 2), round(y + dy + row, 2), anchor)
            left = label.x - before[anchor] * width
            yield label, Box(left, label.y - LINE + 3, left + width, label.y + 3)
