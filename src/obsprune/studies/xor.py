"""XOR with nets 2-2-1 (Hassibi & Stork, 1992): which criterion deletes the right weight?

Right is a weight that the net can do without: deleted, and the others retrained from where they are, it still solves
XOR. That is found by trying all nine. By reasoning it can only be a bias: without one of its input weights a unit sees
one input alone, and the other unit, monotone in each input, cannot tell the four cases apart with a sum; without an
output weight a unit is gone, and one unit cannot do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.errors import InputError
from obsprune.progress import Progress
from obsprune.report.figures import Dots, Figure
from obsprune.studies.base import Cell, Outcome, Study, Table
from obsprune.studies.material import Material
from obsprune.studies.nets import (
    Criterion,
    Nets,
    Shape,
    Task,
    diagonal,
    exact,
    exact_diagonal,
    fisher,
    gauss_newton,
    identity,
    train,
)

CASES = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
TARGETS = (0.0, 1.0, 1.0, 0.0)
WEIGHTS = ("w11", "w12", "w21", "w22", "b1", "b2", "v1", "v2", "c")
BIASES = (4, 5, 8)
CRITERIA = {
    "obs": ("OBS", Criterion("obs", gauss_newton)),
    "obs_exact": ("OBS, exact Hessian", Criterion("obs_exact", exact)),
    "fisher": ("OBS, Fisher matrix", Criterion("fisher", fisher)),
    "obd": ("OBD", Criterion("obd", diagonal)),
    "obd_exact": ("OBD, exact Hessian", Criterion("obd_exact", exact_diagonal)),
    "magnitude": ("magnitude", Criterion("magnitude", identity)),
}


@dataclass(frozen=True)
class Choice:
    """What one criterion deleted first. which: the weight [B]; right: the net can do without it; at_once: XOR is solved
    with no retraining, retrained: with; before, after, finally_: E before, just after it, and retrained.
    """

    which: Tensor
    right: Tensor
    at_once: Tensor
    retrained: Tensor
    before: Tensor
    after: Tensor
    finally_: Tensor

    def values(self, name: str) -> dict[str, float]:
        return {
            f"{name}.right": _share(self.right),
            f"{name}.solves": _share(self.at_once),
            f"{name}.retrained": _share(self.retrained),
            f"{name}.error_growth": float((self.after / self.before).median()),
        }

    def row(self, told: str) -> list[Cell]:
        counts = torch.bincount(self.which, minlength=len(WEIGHTS)).tolist()
        deleted = ", ".join(f"{name} {count}" for name, count in zip(WEIGHTS, counts, strict=True) if count)
        shares = (f"{100 * _share(one):.1f} %" for one in (self.right, self.at_once, self.retrained))
        return [told, *shares, float((self.after / self.before).median()), deleted]


@final
@dataclass(frozen=True)
class Xor(Study):
    """Every seed is a net; those that solve XOR and could do without one of their weights are counted.

    decay: λ of the weight decay; alpha: α of H; start: size of the weights to train from; steps, retraining: of
    Levenberg and Marquardt.
    """

    seeds: int = 1000
    activation: str = "sigmoid"
    decay: float = 1e-4
    alpha: float = 1e-4
    start: float = 1.0
    steps: int = 300
    retraining: int = 200

    def run(self, material: Material, progress: Progress) -> Outcome:
        shape = Shape(2, 2, self.activation)
        progress.stage(f"XOR: {self.seeds} nets", 2 + len(CRITERIA))
        task = _task(shape, self.seeds, self.decay)
        nets = train(task, Nets.whole(torch.stack([shape.start(s, self.start) for s in range(self.seeds)])), self.steps)
        solved = _solved(task, nets).nonzero()[:, 0]
        progress.step(f"{len(solved)} solve it")
        if not len(solved):
            raise InputError("no net solves XOR; more seeds, or less settings.decay")
        task, nets = task.only(solved), nets.only(solved)
        right = can_go(task, nets, self.retraining)
        progress.step("every deletion tried")
        some = right.any(1).nonzero()[:, 0]
        if not len(some):
            raise InputError("no net that solves XOR can do without a weight; more seeds, or less settings.decay")
        task, nets, right = task.only(some), nets.only(some), right[some]
        choices = {name: self._choose(one, task, nets, right, progress) for name, (_, one) in CRITERIA.items()}
        return _outcome(choices, right, len(solved))

    def _choose(self, criterion: Criterion, task: Task, nets: Nets, right: Tensor, progress: Progress) -> Choice:
        after = criterion.remove(task, nets, self.alpha)
        which = (nets.free - after.free).diagonal(dim1=1, dim2=2).argmax(1)
        again = train(task, after, self.retraining)
        progress.step(criterion.name)
        return Choice(
            which,
            right.gather(1, which[:, None])[:, 0],
            _solved(task, after),
            _solved(task, again),
            task.error(nets.w),
            task.error(after.w),
            task.error(again.w),
        )


def can_go(task: Task, nets: Nets, retraining: int) -> Tensor:
    """For every weight, whether the net solves XOR when it is set to 0 and the others are retrained: bool [B, P]."""
    count, size = nets.w.shape
    one_gone = torch.ones(size, size, dtype=nets.w.dtype) - torch.eye(size, dtype=nets.w.dtype)
    w = (nets.w[:, None] * one_gone).flatten(0, 1)
    trials = Nets(w, torch.diag_embed(one_gone).repeat(count, 1, 1))
    which = torch.arange(count).repeat_interleave(size)
    return _solved(task.only(which), train(task.only(which), trials, retraining)).view(count, size)


def _task(shape: Shape, nets: int, decay: float) -> Task:
    x, t = (torch.tensor(values, dtype=torch.float64) for values in (CASES, TARGETS))
    return Task(shape, x.expand(nets, -1, -1), t.expand(nets, -1), decay)


def _solved(task: Task, nets: Nets) -> Tensor:
    return task.accuracy(nets.w) == 100


def minima(error: Tensor) -> int:
    """How many values there are, those within a thousandth of the next lower one taken as the same."""
    ordered = error.sort().values
    return 1 + int((ordered.diff() > 1e-3 * ordered[:-1]).sum())


def _share(chosen: Tensor) -> float:
    return float(chosen.double().mean())


def _outcome(choices: dict[str, Choice], right: Tensor, solved: int) -> Outcome:
    others = [place for place in range(len(WEIGHTS)) if place not in BIASES]
    values = {
        "solved": float(solved),
        "nets": float(len(right)),
        "minima": float(minima(choices["obs"].before)),
        "right.bias": _share(right[:, BIASES]),
        "right.other": _share(right[:, others]),
    }
    for name, choice in choices.items():
        values |= choice.values(name)
    rows = [choice.row(CRITERIA[name][0]) for name, choice in choices.items()]
    columns = ("criterion", "right weight", "solves XOR at once", "solves XOR retrained", "E after / before", "deleted")
    truth: list[Cell] = [f"{100 * _share(right[:, place]):.1f} %" for place in range(len(WEIGHTS))]
    tables = (
        Table(f"the first deletion in {len(right)} nets that solve XOR", columns, rows),
        Table("nets that can do without this weight, retrained", WEIGHTS, [truth]),
    )
    return Outcome(values, tables, (_figure(choices),), {"data": "the four cases of XOR"})


def _figure(choices: dict[str, Choice]) -> Figure:
    """A point a net; nets in the same minimum lie on one another."""
    shown = {CRITERIA[name][0]: choices[name] for name in ("obs", "obd", "magnitude")}
    just = {told: ((1000 * one.before).tolist(), one.after.tolist()) for told, one in shown.items()}
    again = {told: ((1000 * one.before).tolist(), one.finally_.tolist()) for told, one in shown.items()}
    before = "1000 E before"
    panels = (
        Dots("XOR, just after the first deletion", before, "E", just, log_y=True),
        Dots("XOR, retrained after it", before, "E", again, log_y=True),
    )
    return Figure("xor", panels)
