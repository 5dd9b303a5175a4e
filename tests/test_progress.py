"""The time left, on a clock that is moved by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from obsprune.progress import Pace


@dataclass
class Clock:
    """Seconds, moved by hand."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def worst(seconds: Sequence[float], costs: Sequence[float] = (), known: int = 0, since: int = 2) -> float:
    """The largest error of the time left, beside the truth, from step `since` on, at its end and half way to the next
    one. known: how many of the first steps take no time, being done before.
    """
    clock, errors = Clock(), [0.0]
    pace = Pace(len(seconds), costs, clock)
    for number, took in enumerate(seconds):
        if number >= known:
            clock.now += took / 2
            errors += _error(pace, sum(seconds[number:]) - took / 2) if number >= known + since else []
            clock.now += took / 2
        pace.step(fresh=number >= known)
        errors += _error(pace, sum(seconds[number + 1 :])) if number + 1 >= known + since else []
    assert pace.left() == 0.0
    return max(errors)


def _error(pace: Pace, truth: float) -> list[float]:
    left = pace.left()
    assert left is not None
    return [abs(left / truth - 1)] if truth else [left]


def test_equal_steps() -> None:
    assert worst([3.0] * 32, since=1) < 1e-9


def test_what_is_done_once_is_not_expected_again() -> None:
    assert worst([30.0] + [3.0] * 32) < 1e-9


def test_steps_that_vary_a_little() -> None:
    draw = random.Random(0)
    assert worst([3.0 * draw.uniform(0.85, 1.15) for _ in range(32)]) < 0.3


def test_a_dense_block_before_sixty_of_experts() -> None:
    costs = [1.0] + [7.0] * 60
    assert worst([cost * (1 if cost == 1 else 3) for cost in costs], costs) < 1e-9


def test_stages_whose_blocks_cost_more_and_more() -> None:
    """The costs are 10 % off, each stage in its own direction."""
    stages = [(2, 1.0, 1.1), (2, 1.4, 0.9), (18, 2.0, 1.1), (2, 5.0, 0.9)]
    costs = [cost for count, cost, _ in stages for _ in range(count)]
    seconds = [cost * wrong for count, cost, wrong in stages for _ in range(count)]
    assert worst(seconds, costs) < 0.3
    assert worst(seconds) > 0.3  # which is what the costs are for


def test_a_resumed_run_does_not_count_what_was_done_before() -> None:
    assert worst([5.0] * 40, known=30, since=1) < 1e-9


def test_nothing_is_told_before_something_is_measured() -> None:
    pace = Pace(4, clock=Clock())
    assert pace.left() is None
    pace.step(fresh=False)
    assert pace.left() is None


def test_a_step_that_lasts_longer_than_expected() -> None:
    clock = Clock()
    pace = Pace(3, clock=clock)
    clock.now += 2
    pace.step()
    clock.now += 50
    assert pace.left() == 2.0 and math.isclose(pace.elapsed, 52)


@pytest.mark.parametrize("total", [0, 1])
def test_more_steps_than_were_announced(total: int) -> None:
    clock = Clock()
    pace = Pace(total, clock=clock)
    for _ in range(3):
        clock.now += 1
        pace.step()
    assert pace.left() in (None, 0.0)
