"""Accuracies of several methods over rising sparsities and several seeds: values, tables, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from obsprune.report.figures import Curves, Line
from obsprune.studies.base import Cell, Table, spread

TOLD = (0.5, 0.8, 0.9, 0.95)
"""The table has the levels that are nearest to these."""
HIGH = 0.7
"""From here up methods differ."""


@dataclass(frozen=True)
class Sweep:
    """runs: {method: accuracies in percent [seed][level]}; all methods of a seed start from the same dense network, and
    are compared with `baseline` seed by seed.
    """

    levels: Sequence[float]
    runs: Mapping[str, Sequence[Sequence[float]]]
    baseline: str = "magnitude"

    @property
    def seeds(self) -> int:
        return len(next(iter(self.runs.values())))

    def values(self) -> dict[str, float]:
        """METHOD.mean over all levels, METHOD.at.LEVEL; METHOD.gain, .won and .lost beside the baseline: points of the
        mean, levels where it is higher or lower by more than two standard errors.
        """
        found = {}
        for method, runs in self.runs.items():
            found[f"{method}.mean"] = mean(map(mean, runs))
            for level, accuracies in zip(self.levels, zip(*runs, strict=True), strict=True):
                found[f"{method}.at.{level:.2f}"] = mean(accuracies)
            if self.compared:
                found[f"{method}.gain"] = mean(self.gains(method))
                found[f"{method}.won"] = float(self.clear(method, 1))
                found[f"{method}.lost"] = float(self.clear(method, -1))
        return found

    @property
    def compared(self) -> bool:
        """Whether there is a baseline to compare with."""
        return self.baseline in self.runs

    def gains(self, method: str) -> list[float]:
        """By seed: the mean over levels, minus the baseline's."""
        return [mean(a) - mean(b) for a, b in zip(self.runs[method], self.runs[self.baseline], strict=True)]

    def clear(self, method: str, sign: int) -> int:
        """At how many levels it is better (1) or worse (-1) than the baseline by more than two standard errors."""
        pairs = zip(self.runs[method], self.runs[self.baseline], strict=True)
        by_seed = [[sign * (a - b) for a, b in zip(run, other, strict=True)] for run, other in pairs]
        return sum(mean(level) > 2 * stderr(level) for level in zip(*by_seed, strict=True))

    def table(self, title: str, notes: Mapping[str, str]) -> Table:
        """Accuracies at some levels; notes: a last cell for each method."""
        told = sorted({self._nearest(level) for level in TOLD})
        columns = ["method", *(f"{100 * self.levels[index]:.3g} %" for index in told), "mean of all steps", "lr"]
        rows: list[list[Cell]] = [
            [method, *(spread([run[i] for run in runs]) for i in told), spread([mean(run) for run in runs])]
            for method, runs in self.runs.items()
        ]
        return Table(title, columns, [[*row, notes[str(row[0])]] for row in rows])

    def _nearest(self, sought: float) -> int:
        return min(range(len(self.levels)), key=lambda index: abs(self.levels[index] - sought))

    def comparison(self) -> list[Table]:
        """Every method beside the baseline, where there are several seeds."""
        if not self.compared or self.seeds < 2:
            return []
        columns = ["method", "gain in points, mean of all steps", "steps clearly better", "clearly worse"]
        rows: list[list[Cell]] = [
            [method, f"{mean(self.gains(method)):+.2f} ± {stderr(self.gains(method)):.2f}",
             *(f"{self.clear(method, sign)} of {len(self.levels)}" for sign in (1, -1))]
            for method in self.runs
        ]  # fmt: skip
        title = f"Against {self.baseline}, paired by seed; ± standard error, clearly: by more than two of them"
        return [Table(title, columns, rows)]

    def panels(self, title: str) -> list[Curves]:
        """Mean and standard deviation over seeds; everything, and the high sparsities by themselves."""
        high = [index for index, level in enumerate(self.levels) if level >= HIGH] or range(len(self.levels))
        return [self._panel(title, range(len(self.levels))), self._panel(f"the same, from {100 * HIGH:.0f} % up", high)]

    def _panel(self, title: str, places: Sequence[int]) -> Curves:
        levels = [self.levels[place] for place in places]
        lines = {
            method: _band(levels, [[run[place] for place in places] for run in runs])
            for method, runs in self.runs.items()
        }
        return Curves(title, "share of zeros", "test accuracy, %", lines)


def stderr(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value, which has none."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _band(levels: Sequence[float], runs: Sequence[Sequence[float]]) -> Line:
    columns = list(zip(*runs, strict=True))
    width = [stdev(column) if len(column) > 1 else 0.0 for column in columns]
    low, high = ([mean(c) + sign * w for c, w in zip(columns, width, strict=True)] for sign in (-1, 1))
    return Line(list(levels), [mean(column) for column in columns], low, high)
