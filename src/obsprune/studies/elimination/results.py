"""Losses and scores of several methods over rising sparsities: values, tables, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

from obsprune.report.figures import Curves, Figure, Line
from obsprune.studies.base import Cell, Table, spread

OURS = "elimination"
RIVALS = ("random", "magnitude", "gradient", "small")
"""The paper's method, and what it compares it with."""
POINT = 1.0
"""A score within so many points of the dense network's counts as kept."""


@dataclass(frozen=True)
class Judged:
    """A network's loss, and its score in percent, on the test part."""

    loss: float
    score: float


@dataclass
class Case:
    """One depth and noise, with so many epochs of fine-tuning. dense: [seed]; runs: {method: [seed][level]}."""

    depth: int
    noise: float
    tuning: int
    levels: Sequence[float]
    dense: list[Judged] = field(default_factory=list)
    runs: dict[str, list[list[Judged]]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For people."""
        tuned = f", {self.tuning} epochs of fine-tuning" if self.tuning else ""
        return f"{self.depth} hidden, noise {self.noise:g}{tuned}"

    @property
    def prefix(self) -> str:
        """What its values' names begin with."""
        return f"depth{self.depth}.noise{self.noise:g}.{'tuned.' if self.tuning else ''}"

    def losses(self, method: str) -> list[list[float]]:
        """[seed][level]."""
        return [[one.loss for one in run] for run in self.runs[method]]

    def scores(self, method: str) -> list[list[float]]:
        """[seed][level]."""
        return [[one.score for one in run] for run in self.runs[method]]

    def values(self) -> dict[str, float]:
        """dense.loss, dense.score; METHOD.loss.LEVEL, METHOD.score.LEVEL, means over seeds; METHOD.kept: the highest
        sparsity up to which the score is within a point of the dense one; elimination.first: the share of levels at
        which its loss is the lowest of the paper's methods, and elimination.over.METHOD: is lower than that one's.
        """
        found = {"dense.loss": mean(one.loss for one in self.dense), "dense.score": self._dense_score}
        for method in self.runs:
            for level, loss, score in zip(
                self.levels, over_seeds(self.losses(method)), over_seeds(self.scores(method)), strict=True
            ):
                found[f"{method}.loss.{level:.2f}"] = loss
                found[f"{method}.score.{level:.2f}"] = score
            found[f"{method}.kept"] = self.kept(method)
        return {self.prefix + name: value for name, value in {**found, **self._compared()}.items()}

    def kept(self, method: str) -> float:
        """In percent; 0 where the first level is too much."""
        reached = 0.0
        for level, score in zip(self.levels, over_seeds(self.scores(method)), strict=True):
            if score < self._dense_score - POINT:
                break
            reached = 100 * level
        return reached

    @property
    def _dense_score(self) -> float:
        return mean(one.score for one in self.dense)

    def _compared(self) -> dict[str, float]:
        if OURS not in self.runs:
            return {}
        ours = over_seeds(self.losses(OURS))
        others = {method: over_seeds(self.losses(method)) for method in self.runs if method != OURS}
        rivals = [others[method] for method in RIVALS if method in others]
        lower = {m: [a < b for a, b in zip(ours, loss, strict=True)] for m, loss in others.items()}
        first = [all(mine < rival for rival in row) for mine, *row in zip(ours, *rivals, strict=True)]
        return {"elimination.first": mean(first)} | {f"elimination.over.{m}": mean(won) for m, won in lower.items()}

    def table(self, score: str) -> Table:
        """Loss (score) at each level."""
        columns = ["method", *(f"{100 * level:g} %" for level in self.levels), "kept up to"]
        dense = f"{spread([one.loss for one in self.dense])} ({spread([one.score for one in self.dense])})"
        rows: list[list[Cell]] = [
            [method, *map(told, zip(*runs, strict=True)), f"{self.kept(method):g} %"]
            for method, runs in self.runs.items()
        ]
        title = f"{self.title}: test loss ({score}), mean ± std of {len(self.dense)} seeds; dense {dense}"
        return Table(title, columns, rows)


def figures(cases: Sequence[Case]) -> list[Figure]:
    """Losses, a panel for each case; those with and without fine-tuning apart."""
    groups = {
        "loss": [case for case in cases if not case.tuning],
        "loss-tuned": [case for case in cases if case.tuning],
    }
    return [Figure(name, [panel(case) for case in chosen]) for name, chosen in groups.items() if chosen]


def panel(case: Case) -> Curves:
    """Mean loss by method, and the range of the seeds."""
    lines = {}
    for method in case.runs:
        columns = list(zip(*case.losses(method), strict=True))
        lines[method] = Line(case.levels, list(map(mean, columns)), list(map(min, columns)), list(map(max, columns)))
    return Curves(case.title, "share of zeros", "test loss", lines, log_y=True)


def over_seeds(runs: Sequence[Sequence[float]]) -> list[float]:
    """Means, level by level."""
    return [mean(column) for column in zip(*runs, strict=True)]


def told(column: Sequence[Judged]) -> str:
    """Loss, and score in brackets."""
    return f"{spread([one.loss for one in column])} ({mean(one.score for one in column):.1f})"
