"""Sparse recovery (Wu et al., NeurIPS 2024, section 4.1): k-IHT and the forms of I-OBS on y = Xθ* (`sensing.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

import torch

from obsprune.errors import InputError, nearest
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Figure, Line
from obsprune.studies.base import Cell, Outcome, Study, Table, spread
from obsprune.studies.material import Material
from obsprune.studies.sensing import KINDS, PRIORS, Prior, Problem, Rows, Run, Stochastic, Trace, draw_problem, follow

LEVELS = {"half": 0.5, "hundredth": 0.01}
"""Shares of the first distance; how many steps a run takes to each is a value."""

Numbers = dict[str, list[float]]


@dataclass(frozen=True)
class SparseRecovery(Study):
    """k-IHT and the forms of I-OBS on one prior.

    algorithms: those run with the authors' gradient, for `steps` steps; consistent: those with the gradient that
    belongs to XᵀX, for `consistent_steps`; dampings: λ of stochastic I-OBS, whose batches are the share `batch` of all
    rows; marks: steps at which values are given; every: steps between two points of a curve; images: steps after which
    the points of the MNIST prior are shown; published: the authors' values, each [mean] or [mean, standard deviation].
    Values, of a run such as topk, newton.topk or stochastic.3, and steps counted from 0 as the authors do:
    RUN.loss.t before step t, RUN.distance.t after it, RUN.share.t that distance over the one after step 0; RUN.found,
    the share of θ*'s support at the end; RUN.steps.half and .hundredth; gain.t, k-IHT's distance over Topk-I-OBS's; all
    of these means over the seeds. newton.NAME.worst.1, the largest relative distance after one step.
    """

    prior: str = "gaussian"
    seeds: int = 20
    steps: int = 750
    algorithms: list[str] = field(default_factory=lambda: ["topk", "kiht", "obs"])
    consistent: list[str] = field(default_factory=lambda: ["topk", "obs", "kiht"])
    consistent_steps: int = 300
    dampings: list[float] = field(default_factory=list)
    batch: float = 0.125
    marks: list[int] = field(default_factory=lambda: [0, 100, 749])
    every: int = 5
    images: list[int] = field(default_factory=list)
    published: dict[str, list[float]] = field(default_factory=dict)

    def require(self, material: Material) -> None:
        self._prior().goals(material)

    def run(self, material: Material, progress: Progress) -> Outcome:
        prior, runs = self._prior(), self._runs()
        draw, problems = prior.goals(material), []
        traces: dict[str, list[Trace]] = {name: [] for name in runs}
        progress.stage(f"prior {self.prior}", self.seeds * len(runs))
        for seed in range(self.seeds):
            random = torch.Generator().manual_seed(seed)
            problems.append(draw_problem(draw, prior, random))
            for name, run in runs.items():
                traces[name].append(follow(problems[-1], run, self._losses_at(), self._shown(), random))
                progress.step(f"seed {seed}, {name}: distance {traces[name][-1].distances[-1]:.3g}")
        numbers = {name: several for run in runs for name, several in self._numbers(run, traces[run]).items()}
        numbers |= self._gains(numbers)
        values = {name: mean(several) for name, several in numbers.items()} | self._worst(traces, problems)
        pictures = prior.figures(self._images(runs, traces, problems))
        facts = {"runs": f"{self.seeds} runs, each with a θ*, an X and a start of its own; {prior.__doc__}"}
        return Outcome(values, self._tables(runs, numbers), [*figures(runs, traces), *pictures], facts)

    def _prior(self) -> Prior:
        if self.prior not in PRIORS:
            raise InputError(f"unknown prior '{self.prior}'; {nearest(self.prior, PRIORS)}")
        return PRIORS[self.prior]

    def _runs(self) -> dict[str, Run]:
        """By the name that their values begin with."""
        for name in {*self.algorithms, *self.consistent} - set(KINDS):
            raise InputError(f"unknown algorithm '{name}'; {nearest(name, KINDS)}")
        rows, runs = 2 * self._prior().size, {}
        for name in self.algorithms:
            runs[name] = Run("curves", KINDS[name](2 / rows), self.steps)
        for name in self.consistent:
            runs[f"newton.{name}"] = Run("consistent", KINDS[name](1), self.consistent_steps)
        for damping in self.dampings:
            algorithm = Stochastic(damping, round(self.batch * rows))
            runs[f"stochastic.{damping:g}"] = Run("stochastic", algorithm, self.steps)
        return runs

    def _losses_at(self) -> set[int]:
        """Those of the curves, all early ones (for a logarithmic axis), and the marks."""
        return {*range(20), *range(0, self.steps, self.every), self.steps, *self.marks}

    def _shown(self) -> set[int]:
        return {1, *self.images}

    def _numbers(self, name: str, traces: list[Trace]) -> Numbers:
        """The values of one algorithm, run by run. Steps to a level are left out where not every run gets there."""
        numbers = {f"{name}.found": [trace.found for trace in traces]}
        for mark in self.marks:
            if all(mark + 1 < len(trace.distances) for trace in traces):
                numbers[f"{name}.loss.{mark}"] = [trace.losses[mark] for trace in traces]
                numbers[f"{name}.distance.{mark}"] = [trace.distances[mark + 1] for trace in traces]
                numbers[f"{name}.share.{mark}"] = [trace.distances[mark + 1] / trace.distances[1] for trace in traces]
        for level, share in LEVELS.items():
            steps = [done for trace in traces if (done := trace.steps_to(share))]
            if len(steps) == len(traces):
                numbers[f"{name}.steps.{level}"] = [float(done) for done in steps]
        return numbers

    def _gains(self, numbers: Numbers) -> Numbers:
        """How many times as far from θ* k-IHT is as Topk-I-OBS, run by run."""
        pairs = {f"gain.{mark}": [f"{name}.distance.{mark}" for name in ("kiht", "topk")] for mark in self.marks}
        return {
            gain: [far / near for far, near in zip(*(numbers[name] for name in pair), strict=True)]
            for gain, pair in pairs.items()
            if set(pair) <= set(numbers)
        }

    def _worst(self, traces: Mapping[str, list[Trace]], problems: list[Problem]) -> dict[str, float]:
        """newton.NAME.worst.1: the largest ‖θ − θ*‖ / ‖θ*‖ over the runs after one step with a consistent gradient."""
        return {
            f"newton.{name}.worst.1": max(
                trace.distances[1] / float(problem.goal.norm())
                for trace, problem in zip(traces[f"newton.{name}"], problems, strict=True)
            )
            for name in self.consistent
        }

    def _images(
        self, runs: Mapping[str, Run], traces: Mapping[str, list[Trace]], problems: list[Problem]
    ) -> dict[str, Rows]:
        """Of the authors' algorithms after the steps asked for, and of the others after one step; θ* above each."""
        slow = [(name, done) for done in self.images if done <= self.steps for name in self.algorithms]
        wanted = {"authors' gradient": slow, "consistent gradient": [(f"newton.{name}", 1) for name in self.consistent]}
        return {
            title: {"true": [problem.goal for problem in problems]}
            | {
                f"{runs[name].algorithm.title}, {done}": [trace.points[done] for trace in traces[name]]
                for name, done in rows
            }
            for title, rows in wanted.items()
        }

    def _tables(self, runs: Mapping[str, Run], numbers: Numbers) -> list[Table]:
        ours: list[list[Cell]] = [
            [name, spread(several), published(self.published.get(name, []))]
            for name, several in numbers.items()
            if {"loss", "distance", "share", "gain"} & set(name.split("."))
        ]
        ends = ("found", *(f"steps.{level}" for level in LEVELS))
        speed: list[list[Cell]] = [
            [name, run.steps, *(told(numbers.get(f"{name}.{end}")) for end in ends)] for name, run in runs.items()
        ]
        return [
            Table("Mean ± standard deviation over the runs", ["value", "ours", "authors' code"], ours),
            Table(
                "Supports, and steps until the distance is a half and a hundredth of the first",
                ["run", "steps at most", "share of θ*'s support found", *LEVELS],
                speed,
            ),
        ]


def told(values: list[float] | None) -> str:
    """Mean and spread of a value, where every run has it."""
    return spread(values) if values else "not reached by all"


def published(numbers: Sequence[float]) -> str:
    """The authors' mean, and standard deviation where it is known."""
    return " ± ".join(f"{number:.4g}" for number in numbers)


def figures(runs: Mapping[str, Run], traces: Mapping[str, list[Trace]]) -> list[Figure]:
    """One of two panels, losses and distances, for each group of runs."""
    found = []
    for group in dict.fromkeys(run.figure for run in runs.values()):
        chosen = {run.algorithm.title: traces[name] for name, run in runs.items() if run.figure == group}
        losses = {title: band([trace.losses for trace in several]) for title, several in chosen.items()}
        distances = {
            title: band([{done: trace.distances[done] for done in trace.losses} for trace in several])
            for title, several in chosen.items()
        }
        log_x = group == "consistent"
        panels = [
            Curves("loss", "steps done", "mean squared error", losses, log_x, log_y=True),
            Curves("distance", "steps done", "‖θ − θ*‖", distances, log_x, log_y=True),
        ]
        found.append(Figure(group, panels))
    return found


def band(runs: Sequence[Mapping[int, float]]) -> Line:
    """Mean ± standard deviation, by step; cut below a tenth of the mean, for a logarithmic axis has no room for 0."""
    steps = sorted(runs[0])
    several = [[run[step] for run in runs] for step in steps]
    middle, wide = [mean(one) for one in several], [stdev(one) if len(one) > 1 else 0.0 for one in several]
    low = [max(centre - width, centre / 10) for centre, width in zip(middle, wide, strict=True)]
    return Line(steps, middle, low, [centre + width for centre, width in zip(middle, wide, strict=True)])
