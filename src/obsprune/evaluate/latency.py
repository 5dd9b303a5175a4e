"""Times of several networks at the same work, taken by turns, and what may be said of their difference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Any, final

import torch
from torch import Tensor

from obsprune.errors import InputError
from obsprune.evaluate.workloads import Clock, Done, Workload
from obsprune.progress import Progress

LEAST = 0.02
"""Differences smaller than this share are none: two copies of one network differ by as much, by where they lie."""
CHANCE = 0.02
"""How probable as many shorter turns may be between equals: 9 of 10, or 6 of 6."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far outputs may be apart, of their norm: sums in another order, through all layers."""
AS_FAST, SAME, SLOWER = "x as fast", "no faster here", "slower here"


@final
@dataclass(frozen=True)
class Times:
    """Seconds of one phase, turn by turn; two or more."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the times is below the first, a quarter above the second."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def ratio(self, base: Times) -> float:
        """How many times as fast."""
        return base.median / self.median

    def beats(self, base: Times) -> bool:
        """Whether these times are shorter beyond their spread: the quartiles do not touch, and so many turns were
        shorter as hardly ever are by chance. (Either alone is met too often when one network is timed twice.)
        """
        turns = len(self.seconds)
        shorter = sum(mine < its for mine, its in zip(self.seconds, base.seconds, strict=True))
        by_chance = sum(comb(turns, count) for count in range(shorter, turns + 1)) / 2**turns
        apart = self.quartiles[1] < base.quartiles[0] and self.ratio(base) >= 1 + LEAST
        return apart and by_chance <= CHANCE

    def against(self, base: Times) -> str:
        """What may be said of these times beside those of `base`."""
        if self.beats(base):
            return f"{self.ratio(base):.2f} {AS_FAST}"
        return SLOWER if base.beats(self) else SAME

    def tree(self) -> dict[str, Any]:
        """As plain values."""
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high, "all": list(self.seconds)}


@dataclass(frozen=True)
class Bench:
    """How is measured. warmup: runs that are not counted; repeats: of each network, by turns."""

    workload: Workload
    clock: Clock
    warmup: int
    repeats: int

    @torch.inference_mode()
    def measure(self, networks: Mapping[str, Any], batch: int, progress: Progress) -> dict[str, dict[str, Times]]:
        """{phase: {network: its times}}. Each network in its turn, again and again: what else the machine does in the
        meantime falls on all of them.
        """
        inputs = self.workload.inputs(batch)
        taken: dict[str, list[Done]] = {name: [] for name in networks}
        progress.stage(f"batch {batch}", self.turns)
        for turn in range(self.turns):
            for name, network in networks.items():
                progress.detail(name)
                taken[name].append(self.workload.run(network, inputs, self.clock))
            progress.step("" if turn else f"batch {batch}, a turn of {', '.join(networks)}")
        return {
            phase: {
                name: Times(tuple(run.seconds[phase] for run in done[self.warmup :])) for name, done in taken.items()
            }
            for phase in self.workload.phases
        }

    @property
    def turns(self) -> int:
        """How often each network runs."""
        return self.warmup + self.repeats

    @torch.inference_mode()
    def require_alike(self, network: Any, others: Mapping[str, Any], batch: int) -> dict[str, float]:
        """How far the outputs of each other network are from those of one, of their norm. Raises InputError when one is
        farther than rounding explains: its times would be those of something else.
        """
        inputs = self.workload.inputs(batch)
        expected = self.workload.run(network, inputs, self.clock).output
        errors = {
            name: distance(self.workload.run(other, inputs, self.clock).output, expected)
            for name, other in others.items()
        }
        for name, error in errors.items():
            if not error <= TOLERANCE[expected.dtype]:
                raise InputError(
                    f"the outputs of the {name} form are {error:.2g} of their norm away from the dense ones, more than "
                    f"{TOLERANCE[expected.dtype]:g}; its kernels give wrong results here, and are not measured"
                )
        return errors


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64; NaN where one of them is."""
    norm = expected.double().norm()
    return float((found.double() - expected.double()).norm() / norm.clamp_min(1e-300))
