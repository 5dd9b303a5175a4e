"""The MONK's problems (Thrun et al., 1991), on which Hassibi & Stork (1992) tried Optimal Brain Surgeon.

Nets 17-h-1 are trained with weight decay, then pruned by several criteria under one rule: removals go on while the
accuracy on the training cases is what it was. The test cases are looked at afterwards only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.errors import InputError
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Figure, Line
from obsprune.studies.base import Cell, Outcome, Study, Table, best_and_median
from obsprune.studies.cases import INPUTS, PROBLEMS, Problem, all_cases, encoded
from obsprune.studies.material import Material
from obsprune.studies.nets import (
    Criterion,
    Nets,
    Shape,
    Task,
    at,
    diagonal,
    fisher,
    gauss_newton,
    identity,
    path,
    prune,
    train,
    weights_and_pairs,
)

CRITERIA = (
    Criterion("obs", gauss_newton),
    Criterion("fisher", fisher),
    Criterion("obd", diagonal),
    Criterion("magnitude", identity),
    Criterion("planes", gauss_newton, weights_and_pairs),
)
TOLD = {
    "obs": "OBS",
    "fisher": "OBS with the Fisher matrix",
    "obd": "OBD",
    "magnitude": "magnitude",
    "planes": "OBS on planes (degrees of freedom)",
}
SAME_ERROR = 2.0
"""An error of up to this many times the dense net's counts as the same."""


@dataclass(frozen=True)
class Published:
    """Of the paper: weights left, accuracy on the training and the test cases (percent), before as after."""

    weights: int
    train: float
    test: float


@dataclass(frozen=True)
class Run:
    """What one criterion did to B nets. alone: left where the training accuracy first fell, nothing retrained;
    same_error: left within twice the error; error, train, test: along the way without retraining [K, B]; pruned: with
    retraining; before, after: test accuracies.
    """

    name: str
    alone: Tensor
    same_error: Tensor
    error: Tensor
    train: Tensor
    test: Tensor
    pruned: Nets
    before: Tensor
    after: Tensor

    @property
    def kept(self) -> Tensor:
        """Nets that test as well as before."""
        return self.after >= self.before

    @property
    def best(self) -> int:
        """The net with least left among those that test as well as before; where there is none, among all."""
        return int((self.pruned.left + len(self.error) * ~self.kept).argmin())

    @property
    def alone_after(self) -> Tensor:
        """Test accuracy where the training accuracy was about to fall, nothing retrained [B]."""
        return self.test.gather(0, (len(self.test) - self.alone)[None])[0]

    def values(self) -> dict[str, float]:
        left, kept = self.pruned.left, self.kept.double().mean()
        return {
            f"{self.name}.best": float(left[self.best]) if bool(self.kept[self.best]) else math.nan,
            f"{self.name}.median": _median(left),
            f"{self.name}.kept": float(kept),
            f"{self.name}.test_change": float((self.after - self.before).mean()),
            f"{self.name}.alone.best": float(self.alone.min()),
            f"{self.name}.alone.median": _median(self.alone),
            f"{self.name}.alone.test_change": float((self.alone_after - self.before).mean()),
            f"{self.name}.same_error.median": _median(self.same_error),
        }

    def row(self) -> list[Cell]:
        return [
            TOLD[self.name],
            best_and_median(self.alone.tolist()),
            best_and_median(self.same_error.tolist()),
            best_and_median(self.pruned.left.tolist()),
            f"{int(self.kept.sum())} of {len(self.kept)}",
            f"{float(self.alone_after.mean()):.2f}",
            f"{float(self.after.mean()):.2f}",
        ]


@final
@dataclass(frozen=True)
class Monks(Study):
    """One of the problems. Every seed is a net, and with problems 2 and 3 a drawing of the training cases too.

    decay: λ of the weight decay; alpha: α of H (λ: the curvature of what was minimised); start: size of the weights to
    train from; steps, retraining: of Levenberg and Marquardt; trained: nets of a lower training accuracy are left out.
    """

    published: Published = Published(0, 0.0, 0.0)
    seeds: int = 20
    problem: int = 1
    hidden: int = 3
    activation: str = "sigmoid"
    decay: float = 1e-4
    alpha: float = 1e-4
    start: float = 0.5
    steps: int = 400
    retraining: int = 100
    trained: float = 0.0

    def require(self, material: Material) -> None:
        self._problem().training.told(material)

    def run(self, material: Material, progress: Progress) -> Outcome:
        shape = Shape(len(INPUTS), self.hidden, self.activation)
        (task, test), told = self._tasks(shape, material)
        progress.stage(f"MONK-{self.problem}: pruning {self.seeds} nets of {shape.weights} weights", len(CRITERIA) + 1)
        nets = train(task, Nets.whole(torch.stack([shape.start(s, self.start) for s in range(self.seeds)])), self.steps)
        chosen = (task.accuracy(nets.w) >= self.trained).nonzero()[:, 0]
        progress.step(f"{len(chosen)} nets trained")
        if not len(chosen):
            raise InputError(f"no net reaches settings.trained, {self.trained:g} % of the training cases; lower it")
        task, test, nets = task.only(chosen), test.only(chosen), nets.only(chosen)
        runs = [self._run(criterion, task, test, nets, progress) for criterion in CRITERIA]
        return self._outcome(runs, task, nets, chosen, told)

    def _problem(self) -> Problem:
        if self.problem not in PROBLEMS:
            raise InputError(f"settings.problem is {self.problem}; MONK's problems are 1, 2 and 3")
        return PROBLEMS[self.problem]

    def _tasks(self, shape: Shape, material: Material) -> tuple[list[Task], str]:
        """Training and test cases of every net, and where they come from."""
        problem = self._problem()
        parts = [problem.training.cases(problem.holds, material, seed) for seed in range(self.seeds)]
        everything = (all_cases(), problem.holds(all_cases()))
        tasks = [self._task(shape, parts), self._task(shape, [everything] * self.seeds)]
        return tasks, problem.training.told(material)

    def _task(self, shape: Shape, parts: Iterable[tuple[Tensor, Tensor]]) -> Task:
        cases, labels = zip(*parts, strict=True)
        return Task(shape, torch.stack([encoded(one) for one in cases]), torch.stack(labels).double(), self.decay)

    def _run(self, criterion: Criterion, task: Task, test: Task, nets: Nets, progress: Progress) -> Run:
        way = path(criterion, task, nets, self.alpha)
        error, right, tested = (
            torch.stack([of(one.w) for one in way]) for of in (task.error, task.accuracy, test.accuracy)
        )
        alone, same = _left(right >= right[0]), _left(error <= SAME_ERROR * error[0])
        start = at(way, len(way) - alone)  # what does not need retraining is done already
        pruned = prune(criterion, task, start, right[0], self.alpha, self.retraining)
        progress.step(f"{criterion.name}: {int(pruned.left.min())} left in the smallest")
        return Run(criterion.name, alone, same, error, right, tested, pruned, tested[0], test.accuracy(pruned.w))

    def _outcome(self, runs: Sequence[Run], task: Task, nets: Nets, seeds: Tensor, told: str) -> Outcome:
        right, obs = task.accuracy(nets.w), runs[0]
        values = {
            "nets": float(len(nets.w)),
            "dense.weights": float(nets.w.shape[1]),
            "dense.train_accuracy": _median(right),
            "dense.test_accuracy": _median(obs.before),
            "dense.test_mean": float(obs.before.mean()),
            "dense.slope": _median(task.slope(nets.w)),
            "hessian.off_diagonal": _median(off_diagonal(task, nets)),
            "obs.train_accuracy": float(task.accuracy(obs.pruned.w)[obs.best]),
            "obs.test_accuracy": float(obs.after[obs.best]),
        }
        for run in runs:
            values |= run.values()
        tables = (
            self._comparison(runs, values),
            duels(runs),
            survivors(task.shape, obs.pruned.w[obs.best], int(seeds[obs.best])),
        )
        return Outcome(values, tables, (self._figure(runs),), {"data": told})

    def _comparison(self, runs: Sequence[Run], values: dict[str, float]) -> Table:
        size, tested = f"{values['dense.weights']:g}", f"{values['dense.test_mean']:.2f}"
        whole: list[Cell] = ["before", size, size, size, "", tested, tested]
        paper: list[Cell] = ["OBS, the paper", "", "", str(self.published.weights), "", "", f"{self.published.test:g}"]
        return Table(
            f"MONK-{self.problem}: what is left, best and median of {values['nets']:g} nets",
            ("criterion", "not retrained", f"error within {SAME_ERROR:g}×", "retrained", "nets that test as well",
             "mean test accuracy, not retrained", "mean test accuracy, retrained"),
            [whole, paper, *(run.row() for run in runs)],
        )  # fmt: skip

    def _figure(self, runs: Sequence[Run]) -> Figure:
        title = f"MONK-{self.problem}, not retrained"
        removed = "removed weights (planes: degrees of freedom)"
        return Figure(
            f"monk{self.problem}",
            (
                Curves(title, removed, "training error E", {run.name: _line(run.error) for run in runs}, log_y=True),
                Curves(title, removed, "test accuracy, %", {run.name: _line(run.test) for run in runs}),
            ),
        )


def off_diagonal(task: Task, nets: Nets) -> Tensor:
    """The share of Σ H_ij² that is off the diagonal, H scaled to a diagonal of 1 [B]; a dead weight has no part."""
    X = task.gradients(nets.w)
    H = X.mT @ X
    scale = H.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(H.dtype).tiny).rsqrt()
    R = (scale[:, :, None] * H * scale[:, None, :]).square()
    return 1 - R.diagonal(dim1=1, dim2=2).sum(1) / R.sum((1, 2))


def duels(runs: Sequence[Run]) -> Table:
    """OBS against each of the others, net by net."""
    obs, rows = runs[0], []
    for run in runs[1:]:
        pairs = ((obs.alone, run.alone), (obs.same_error, run.same_error), (obs.pruned.left, run.pruned.left))
        rows.append(
            [TOLD[run.name], *(" / ".join(str(int(n.sum())) for n in (a < b, a == b, a > b)) for a, b in pairs)]
        )
    columns = ("against", "not retrained", f"error within {SAME_ERROR:g}×", "retrained")
    return Table("nets in which OBS leaves fewer / as many / more", columns, rows)


def survivors(shape: Shape, w: Tensor, seed: int) -> Table:
    """A net by its weights that are not 0."""
    names = [*([*INPUTS, "bias"] for _ in range(shape.hidden)), [*(f"h{i + 1}" for i in range(shape.hidden)), "bias"]]
    rows = []
    for unit, (places, sources) in enumerate(zip(shape.units, names, strict=True)):
        alive = [f"{name} {float(w[i]):+.2f}" for i, name in zip(places, sources, strict=True) if float(w[i]) != 0]
        rows.append([f"h{unit + 1}" if unit < shape.hidden else "output", ", ".join(alive) or "none"])
    return Table(f"the smallest net of OBS (seed {seed}): the weights left into each unit", ("unit", "weights"), rows)


def _left(good: Tensor) -> Tensor:
    """What is left at the last step before the first that is not good [B]; good: [K, B], the first row before any."""
    return len(good) + 1 - good.long().cumprod(0).sum(0)


def _line(values: Tensor) -> Line:
    """Median over the nets, between the quartiles; values: [K, B]."""
    low, middle, high = torch.quantile(values, torch.tensor((0.25, 0.5, 0.75), dtype=values.dtype), dim=1).tolist()
    return Line(list(range(len(values))), middle, low, high)


def _median(values: Tensor) -> float:
    """The middle of two, where there are two."""
    return float(values.double().quantile(0.5))
