"""Labels of points: beside them, inside the picture, and not on one another."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from obsprune.report.labels import NEAR, Box, place

ROOM = Box(50.0, 0.0, 380.0, 200.0)
BEFORE = {"start": 0.0, "middle": 0.5, "end": 1.0}


def boxes(points: list[tuple[float, float]], widths: list[float], taken: tuple[Box, ...] = ()) -> list[Box]:
    labels = place(points, widths, ROOM, taken)
    found = []
    for label, width in zip(labels, widths, strict=True):
        left = label.x - BEFORE[label.anchor] * width
        found.append(Box(left, label.y - 9, left + width, label.y + 3))
    return found


def test_a_label_is_up_to_the_right_where_there_is_room() -> None:
    (label,) = place([(100.0, 100.0)], [20.0], ROOM)
    assert (label.x, label.y, label.anchor) == (108.0, 93.0, "start")
    (label,) = place([(370.0, 100.0)], [20.0], ROOM)
    assert label.anchor == "end"


@given(some.lists(some.tuples(some.floats(60, 370), some.floats(20, 180)), min_size=1, max_size=4))
def test_few_labels_never_meet(points: list[tuple[float, float]]) -> None:
    found = boxes(points, [30.0] * len(points))
    assert not any(one.meets(other) for one, other in combinations(found, 2))
    assert all(ROOM.holds(box) for box in found)
    marks = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    assert not any(box.meets(mark) for box in found for mark in marks)


def test_points_in_one_place_are_all_named() -> None:
    found = boxes([(200.0, 100.0)] * 6, [6.4] * 6)
    assert not any(one.meets(other) for one, other in combinations(found, 2))


def test_what_is_taken_stays_free() -> None:
    taken = Box(100.0, 80.0, 200.0, 98.0)
    (box,) = boxes([(100.0, 100.0)], [20.0], (taken,))
    assert not box.meets(taken)


@pytest.mark.parametrize(
    ("width", "taken"), [(20.0, Box(0.0, 0.0, 400.0, 300.0)), (1000.0, Box(0.0, 0.0, 1.0, 1.0))], ids=["full", "long"]
)
def test_where_there_is_no_room_the_first_place_is_taken(width: float, taken: Box) -> None:
    (label,) = place([(100.0, 100.0)], [width], ROOM, [taken])
    assert (label.x - 100, label.y - 100, label.anchor) == NEAR[0]
