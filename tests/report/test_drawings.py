"""Pictures: everything is inside them, where its value belongs, and can be read."""

from __future__ import annotations

import math

import pytest

from obsprune.report.drawings import (
    Bar,
    Bars,
    Chart,
    Interval,
    Intervals,
    Point,
    Scale,
    Series,
    span,
)


@pytest.mark.parametrize(
    ("values", "log", "labels"),
    [
        ((0.0, 1.0), False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ((0.94, 3.06), False, ["1", "1.5", "2", "2.5", "3"]),
        ((-0.3, 0.25), False, ["-0.2", "0", "0.2"]),
        ((5.0, 5.0), False, ["5"]),
        ((0.9, 120.0), True, ["1", "2", "5", "10", "20", "50", "100"]),
        ((1e-6, 2e3), True, ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1", "10", "100", "1000"]),
    ],
)
def test_ticks_are_round_and_on_the_axis(values: tuple[float, float], log: bool, labels: list[str]) -> None:
    scale = Scale(values, (10.0, 110.0), log)
    ticks = scale.ticks()
    assert [tick.label for tick in ticks] == labels
    assert all(10.0 <= tick.place <= 110.0 for tick in ticks)
    assert [tick.place for tick in ticks] == sorted({tick.place for tick in ticks})


def test_a_scale_is_straight_and_may_point_upward() -> None:
    assert [Scale((2.0, 4.0), (0.0, 10.0))(value) for value in (2.0, 3.0, 4.0)] == [0.0, 5.0, 10.0]
    assert [Scale((1.0, 100.0), (50.0, 0.0), log=True)(value) for value in (1.0, 10.0, 100.0)] == [50.0, 25.0, 0.0]
    assert Scale((3.0, 3.0), (0.0, 8.0))(3.0) == 4.0


@pytest.mark.parametrize("values", [[], [0.0], [7.0, 7.0], [-3.0], [1.0, 2.0]])
def test_there_is_room_around_all_values(values: list[float]) -> None:
    low, high = span(values)
    assert low < high and all(low < value < high for value in values)


@pytest.mark.parametrize("log", [False, True])
def test_points_are_inside_and_in_their_order(log: bool) -> None:
    points = [Point(1, 8.0), Point(2, 2.0, "lowest", star=True), Point(3, 4.0)]
    chart = Chart("c", "t", "d", "x", "y", [Series("s", points)], {"dense": 1.5}, log_y=log)
    places = chart.layout[0]
    assert [place.x for place in places] == sorted(place.x for place in places)
    assert places[0].y < places[2].y < places[1].y < chart.lines[0].place, "up is less"
    assert all(chart.left < one.x < chart.width and chart.top < one.y < chart.bottom for one in places)
    assert [one.star for one in places] == [False, True, False] and chart.lines[0].label == "dense 1.5"


def test_several_series_have_a_legend() -> None:
    """Dots that are joined are called so; what stands alone needs no legend."""
    line, dots = Series("front", [Point(1, 2.0), Point(2, 1.0)]), Series("others", [Point(3, 3.0)], joined=False)
    lonely = Series("front of one", [Point(1, 1.0)])
    assert Chart("c", "t", "d", "x", "y", [line, dots, lonely]).keys == [
        ("—●—", "front"), ("■", "others"), ("▲", "front of one")
    ]  # fmt: skip
    assert Chart("c", "t", "d", "x", "y", [line]).keys == []


def test_numbers_of_things_have_no_fractions() -> None:
    series = [Series("s", [Point(1, 0.0), Point(2, 1.0)])]
    assert [tick.label for tick in Chart("c", "t", "d", "x", "y", series, whole=True).ticks_x] == ["1", "2"]
    assert "1.5" in [tick.label for tick in Chart("c", "t", "d", "x", "y", series).ticks_x]


def test_bars_are_as_long_as_their_values() -> None:
    bars = Bars("b", "t", "d", [Bar("a", 4.0, "4 s"), Bar("b", 1.0, "1 s"), Bar("c", 0.0, "0 s")])
    assert [bars.length(bar) for bar in bars.bars] == [bars.width, bars.width / 4, 0.0]
    assert Bars("b", "t", "d", [Bar("a", 0.0, "")]).length(Bar("a", 0.0, "")) == 0.0


def test_intervals_begin_with_zero() -> None:
    drawn = Intervals("i", "t", "d", [Interval("0", 0, 30, 4000, "told")], "tokens", ("asked for", 64))
    places = [drawn.at(value) for value in (0, 30, 64, 4000)]
    assert places == sorted(places) and drawn.left < places[0] and places[-1] < drawn.width
    assert [tick.label for tick in drawn.ticks] == ["0", "1", "10", "100", "1,000"]
    assert math.isclose(drawn.ticks[0].place, places[0])
