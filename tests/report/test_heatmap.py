"""A heat map has a place for each value; darker is higher, and what is written can be read."""

from __future__ import annotations

from itertools import pairwise

import pytest

from obsprune.report.heatmap import RAMP, HeatCell, HeatMap, ink, luminance, shade


def test_colours_are_read_without_colours() -> None:
    """Every step of the ramp is darker, and letters on it have at least 4.5 : 1."""
    shades = [shade(step / 500) for step in range(501)]
    assert shades[0] == RAMP[0] and shades[-1] == RAMP[-1] and shade(-1.0) == RAMP[0] and shade(2.0) == RAMP[-1]
    lights = [luminance(one) for one in shades]
    assert all(first > second - 1e-3 for first, second in pairwise(lights))
    ramp = [luminance(colour) for colour in RAMP]
    assert all(first > 1.2 * second for first, second in pairwise(ramp))
    for light, fill in zip(lights, shades, strict=True):
        low, high = sorted((light, luminance(ink(fill))))
        assert (high + 0.05) / (low + 0.05) >= 4.5, fill


def test_luminance_is_that_of_the_standard() -> None:
    assert luminance("#ffffff") == pytest.approx(1.0) and luminance("#000000") == 0.0
    assert luminance("#ff0000") == pytest.approx(0.2126) and luminance("#777777") == pytest.approx(0.1845, abs=1e-3)


def heat(values: dict[tuple[int, int], float], rows: int, columns: int, **settings: object) -> HeatMap:
    cells = [HeatCell(row, column, value, f"{value:g}", "told") for (row, column), value in values.items()]
    names = [f"row {row}" for row in range(rows)], [f"column {column}" for column in range(columns)]
    return HeatMap("h", "t", "d", *names, cells, "kind", "error", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 7), (126, 7), (3, 40)])
def test_a_heat_map_has_a_place_for_each_value(rows: int, columns: int) -> None:
    places = {(row, column): row + column / 100 for row in range(rows) for column in range(columns)}
    drawn = heat(places, rows, columns)
    found = {(one.x, one.y) for one in drawn.squares}
    assert len(found) == rows * columns
    assert all(drawn.left <= x + 0.01 and x + drawn.cell_width <= drawn.width + 0.1 for x, _ in found)
    assert all(drawn.top <= y + 0.01 and y + drawn.cell_height < drawn.height - 30 for _, y in found)
    assert all(one.x + drawn.legend_width <= drawn.width for one in drawn.legend)
    assert drawn.cell_width >= 40, "the number in it"


def test_darker_is_higher() -> None:
    drawn = heat({(0, 0): 0.001, (0, 1): 0.1, (0, 2): 0.01}, 1, 3, log=True)
    low, high, middle = (luminance(one.fill) for one in drawn.squares)
    assert low > middle > high
    assert drawn.shades(0.01) == pytest.approx(0.5)
    assert [one.text for one in drawn.legend if one.text] == ["0.001", "0.01", "0.1"]


def test_rounding_is_not_drawn_as_a_difference() -> None:
    near = {(0, 0): 0.5, (0, 1): 0.5001}
    assert len({one.fill for one in heat(near, 1, 2, least=0.0).squares}) == 2
    close, other = (luminance(one.fill) for one in heat(near, 1, 2, least=0.01).squares)
    assert close == pytest.approx(other, abs=0.02)


def test_zero_among_ratios_is_the_lowest() -> None:
    drawn = heat({(0, 0): 0.0, (0, 1): 0.1, (0, 2): 0.001}, 1, 3, log=True)
    assert drawn.squares[0].fill == drawn.squares[2].fill == RAMP[0]
    assert heat({(0, 0): 0.0}, 1, 1, log=True).squares[0].fill
