"""Times by turns, and what may be said of them, by a clock that is told what to show."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from obsprune.errors import InputError
from obsprune.evaluate.latency import CHANCE, Bench, Times, distance
from obsprune.evaluate.workloads import Clock, Done, Workload
from obsprune.progress import Silent


@dataclass
class FakeTime:
    """A clock, and networks that take so many seconds of it."""

    now: float = 0.0
    order: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def network(self, name: str, *seconds: float, output: float = 1.0) -> Network:
        return Network(self, name, list(seconds), torch.tensor([output, 1.0]))


@dataclass
class Network:
    time: FakeTime
    name: str
    seconds: list[float]
    output: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        self.time.order.append(self.name)
        self.time.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return self.output


class OneForward(Workload):
    phases, said = ("forward",), "a forward"

    def inputs(self, batch: int) -> Tensor:
        return torch.zeros(batch)

    def run(self, network: Network, inputs: Tensor, clock: Clock) -> Done:
        began = clock()
        output = network(inputs)
        return Done({"forward": clock() - began}, output)


def bench(time: FakeTime, warmup: int = 1, repeats: int = 3) -> Bench:
    return Bench(OneForward(), time, warmup, repeats)


def test_networks_take_turns_and_warm_ups_do_not_count() -> None:
    time = FakeTime()
    networks = {"a": time.network("a", 99.0, 1.0, 2.0, 6.0), "b": time.network("b", 99.0, 4.0)}
    found = bench(time).measure(networks, 2, Silent())
    assert time.order == ["a", "b"] * 4
    assert found == {"forward": {"a": Times((1.0, 2.0, 6.0)), "b": Times((4.0, 4.0, 4.0))}}
    assert found["forward"]["a"].tree() == {"median": 2.0, "low": 1.5, "high": 4.0, "all": [1.0, 2.0, 6.0]}


TEN = (9.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 30.0)


@pytest.mark.parametrize(
    ("taken", "base", "said"),
    [
        ((5.0,) * 10, TEN, "2.00 x as fast"),
        ((*(5.0,) * 9, 40.0), TEN, "2.00 x as fast"),  # a hiccup of the machine
        ((*(5.0,) * 8, 40.0, 40.0), TEN, "no faster here"),  # two of ten are too many
        (TEN, TEN, "no faster here"),
        ((5.0, 5.0, 5.0, 12.0, 12.0, 12.0), (8.0,) * 6, "no faster here"),
        ((7.0,) * 6, (10.0,) * 6, "1.43 x as fast"),
        ((7.0,) * 5, (10.0,) * 5, "no faster here"),  # five turns come out like that by chance once in 32 times
        ((9.9,) * 10, (10.0,) * 10, "no faster here"),  # as much as two copies of one network differ by
        ((7.0, 8.0, 9.0, 10.0, 11.0, 12.0), (7.5, 8.5, 9.5, 10.5, 11.5, 12.5), "no faster here"),  # within the spread
        ((20.0,) * 10, (10.0,) * 10, "slower here"),
        ((20.0,) * 5, (10.0,) * 5, "no faster here"),
    ],
)
def test_only_what_is_beyond_the_spread_is_said(taken: tuple[float, ...], base: tuple[float, ...], said: str) -> None:
    assert Times(taken).against(Times(base)) == said


def test_one_network_timed_twice_is_hardly_ever_told_apart() -> None:
    """Noise like that of a busy machine: most times alike, some much longer, all of them drifting."""
    generator = random.Random(0)

    def noise(turn: int) -> float:
        return (1 + 0.1 * turn) * (1 + generator.gauss(0, 0.05) + 2 * (generator.random() < 0.2))

    for turns in (3, 6, 10):
        drawn = [[Times(tuple(map(noise, range(turns)))) for _ in range(2)] for _ in range(2000)]
        assert sum(one.against(other) != "no faster here" for one, other in drawn) <= CHANCE * len(drawn)


def test_other_outputs_are_an_error_before_anything_is_timed() -> None:
    time = FakeTime()
    right, near, wrong, broken = (time.network("x", 1.0, output=value) for value in (1.0, 1.00001, 1.01, float("nan")))
    assert bench(time).require_alike(right, {"near": near}, 1)["near"] < 1e-4
    for other in (wrong, broken):
        with pytest.raises(InputError, match=r"the outputs of the CSR form are .* more than 0\.0001"):
            bench(time).require_alike(right, {"CSR": other}, 1)


def test_distance_is_relative() -> None:
    assert distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.5 / (9 + 20.25) ** 0.5)
