"""The convergence bounds of I-OBS (`curved.py`), held against many steps from random and from the worst starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import linear_regression, mean, median

import torch
from torch import Tensor

from obsprune.core.iobs import k_iht
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Dots, Figure, Line
from obsprune.studies.base import Cell, Outcome, Study, Table
from obsprune.studies.curved import (
    FACTS,
    NEAR,
    OPTIONS,
    SENSING,
    Option,
    Problem,
    Shape,
    Trial,
    attempt,
    climb,
    draw_problem,
    kind_of,
    projection_ratio,
    starts,
    step,
)
from obsprune.studies.material import Material


@dataclass(frozen=True)
class Evidence:
    """Of one option on one shape: trials at random starting points by the kind of problem, the worst that were searched
    for, and the worst ratios of the projection alone.
    """

    by_kind: dict[str, list[Trial]]
    searched: list[Trial]
    projections: list[float]

    @property
    def trials(self) -> list[Trial]:
        return [trial for trials in self.by_kind.values() for trial in trials]

    def values(self, name: str) -> dict[str, float]:
        every = [*self.trials, *self.searched]
        near = [trial for trial in self.trials if trial.before < NEAR]
        order = linear_regression([math.log(one.before) for one in near], [math.log(one.after) for one in near]).slope
        return {
            f"{name}.trials": len(every),
            f"{name}.violations": sum(trial.violates for trial in every),
            f"{name}.largest": max(trial.ratio for trial in every),
            f"{name}.median": median(trial.ratio for trial in self.trials),
            f"{name}.newton.largest": max(trial.newton / trial.newton_bound for trial in every),
            f"{name}.projection.largest": max(self.projections),
            f"{name}.unpromised": mean(trial.unpromised for trial in self.trials),
            f"{name}.farther": mean(trial.after > trial.before for trial in self.trials),
            f"{name}.order": order,
        }


@dataclass(frozen=True)
class ConvergenceBound(Study):
    """Both options' bounds on random problems: at random starting points and at those found by hill climbing.

    Even seeds draw a Gaussian X, odd ones X = I. small: the shape on which all supports are tried; large: the
    one on which the support is greedy, for which nothing is promised; starts: starting points a problem; climb: steps
    of hill climbing; rate_from and rate_steps: distance and length of the runs that show the rate.
    """

    seeds: int = 20
    small: Shape = field(default_factory=lambda: Shape(8, 2, 4))
    large: Shape = field(default_factory=lambda: Shape(64, 6, 16))
    starts: int = 40
    climb: int = 150
    rate_from: float = 0.5
    rate_steps: int = 8

    def run(self, material: Material, progress: Progress) -> Outcome:
        cases = {"exact": self.small, "greedy.small": self.small, "topk.small": self.small}
        cases |= {"greedy": self.large, "topk": self.large}
        evidence = {name: Evidence({kind: [] for kind in SENSING}, [], []) for name in cases}
        progress.stage("bounds", self.seeds * len(cases))
        for seed in range(self.seeds):
            for name, shape in cases.items():
                random = torch.Generator().manual_seed(seed)
                problem = draw_problem(shape, seed, random)
                self._gather(evidence[name], kind_of(seed), problem, option_of(name), random)
                progress.step(f"seed {seed}, {name}: observed/bound at most {evidence[name].searched[-1].ratio:.3g}")
        values = {key: value for name, one in evidence.items() for key, value in one.values(name).items()}
        values["exact.printed.largest"] = max(one.after / one.printed for one in evidence["exact"].searched)
        rates = self._rates()
        values |= self._quadratic(cases) | {f"rate.{name}.after": line[-1] for name, line in rates.items()}
        return Outcome(values, [table(evidence)], [*dots(evidence), rate_figure(rates)], FACTS)

    def _gather(self, evidence: Evidence, kind: str, problem: Problem, option: Option, random: torch.Generator) -> None:
        """Trials of one problem; the search for a bad start begins at the worst of the random ones."""
        points = starts(problem, self.starts, random)
        trials = [attempt(problem, option, point) for point in points]
        worst = max(range(len(points)), key=lambda index: trials[index].ratio)
        searches: list[Callable[[Tensor], float]] = [
            lambda error: attempt(problem, option, problem.goal + error).ratio,
            lambda error: projection_ratio(problem, option, error),
        ]
        start, error = (climb(one, points[worst] - problem.goal, self.climb, random) for one in searches)
        evidence.by_kind[kind].extend(trials)
        evidence.searched.append(attempt(problem, option, problem.goal + start))
        evidence.projections.append(projection_ratio(problem, option, error))

    def _quadratic(self, cases: dict[str, Shape]) -> dict[str, float]:
        """quadratic.NAME.worst: the largest ‖θ − θ*‖ / ‖θ*‖ after one step on quadratics."""
        found = {}
        for name, shape in cases.items():
            left = []
            for seed in range(self.seeds):
                random = torch.Generator().manual_seed(seed)
                problem = replace(draw_problem(shape, seed, random), bump=0.0)
                for point in starts(problem, 4, random):
                    _, following = step(problem, option_of(name), point)
                    left.append(float((following - problem.goal).norm() / problem.goal.norm()))
            found[f"quadratic.{name}.worst"] = max(left)
        return found

    def _rates(self) -> dict[str, list[float]]:
        """Median ‖e‖ after 0, 1, … steps of each option and of k-IHT (step 1/L), all from the same points."""
        runs: dict[str, list[list[float]]] = {"exact": [], "topk": [], "kiht": []}
        for seed in range(self.seeds):
            random = torch.Generator().manual_seed(seed)
            problem = draw_problem(self.small, seed, random)
            direction = torch.randn(self.small.size, generator=random, dtype=torch.float64)
            start = problem.goal + self.rate_from * direction / direction.norm()
            for name, run in runs.items():
                run.append(errors(problem, mover(problem, name), start, self.rate_steps))
        return {
            name: [median(run[t] for run in several) for t in range(self.rate_steps + 1)]
            for name, several in runs.items()
        }


def option_of(name: str) -> Option:
    """`greedy.small` -> greedy."""
    return OPTIONS[name.partition(".")[0]]


def mover(problem: Problem, name: str) -> Callable[[Tensor], Tensor]:
    """One step of an option, or of k-IHT."""
    if name in OPTIONS:
        return lambda point: step(problem, OPTIONS[name], point)[1]
    rate = 1 / problem.constants[1]
    return lambda point: k_iht(point, problem.gradient(point), rate, problem.shape.survivors)


def errors(problem: Problem, move: Callable[[Tensor], Tensor], point: Tensor, steps: int) -> list[float]:
    """‖e‖ after 0, 1, … steps."""
    found = [float((point - problem.goal).norm())]
    for _ in range(steps):
        point = move(point)
        found.append(float((point - problem.goal).norm()))
    return found


def table(evidence: dict[str, Evidence]) -> Table:
    """All values, an option a row."""
    rows: list[list[Cell]] = [[name, *one.values(name).values()] for name, one in evidence.items()]
    return Table("Observed/bound", ["", "trials", "violations", "largest", "median", "Newton step alone, largest",
                 "projection alone, largest", "closer without promise", "farther", "order near θ*"], rows)  # fmt: skip


def dots(evidence: dict[str, Evidence]) -> list[Figure]:
    """Observed/bound over ‖e‖: a figure for each shape, a panel for each option."""
    titles = {"bounds-small": {"exact": "Option 2, best support", "topk.small": "Topk-I-OBS"},
              "bounds-large": {"greedy": "Option 2, greedy support", "topk": "Topk-I-OBS"}}  # fmt: skip
    return [Figure(figure, [panel(title, evidence[name]) for name, title in names.items()])
            for figure, names in titles.items()]  # fmt: skip


def panel(title: str, evidence: Evidence) -> Dots:
    """Random starting points by the kind of problem, and those that were searched for."""
    clouds = {kind: cloud(trials) for kind, trials in evidence.by_kind.items()}
    return Dots(title, "log₁₀ ‖e‖", "observed / bound", clouds | {"searched for": cloud(evidence.searched)}, log_y=True)


def cloud(trials: list[Trial]) -> tuple[list[float], list[float]]:
    """Distances (their logarithms) and ratios."""
    return [math.log10(trial.before) for trial in trials], [trial.ratio for trial in trials]


def rate_figure(rates: dict[str, list[float]]) -> Figure:
    """Errors over steps."""
    names = {"exact": "Option 2, best support", "topk": "Topk-I-OBS", "kiht": "k-IHT"}
    lines = {names[name]: Line(range(len(run)), run) for name, run in rates.items()}
    return Figure("rate", [Curves("median over the problems", "steps", "‖θ − θ*‖", lines, log_y=True)])
