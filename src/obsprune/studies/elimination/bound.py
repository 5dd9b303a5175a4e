"""How good elimination–compensation's first-order expansion is: the error seen, against a bound on it, for one weight
at a time and for many at once; the paper leaves this open. Networks with tanh, on the diffusion–sorption data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median
from typing import final

import torch
from torch import Tensor

from obsprune.core.patterns import Lowest
from obsprune.engine.curvature import Trainee
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Dots, Figure, Line
from obsprune.studies.base import Cell, Outcome, Study, Table, spread
from obsprune.studies.elimination.data import PROBLEMS
from obsprune.studies.elimination.intervals import Moving, output, remainder_bound
from obsprune.studies.elimination.methods import METHODS, Removal, weight_of
from obsprune.studies.elimination.networks import Bench, Elimination
from obsprune.studies.material import Material

ROUNDING = 1e-12
"""An error may be so much above the bound: sums of float64 numbers of size 1."""


@dataclass(frozen=True)
class Seen:
    """Root mean squares over samples, of one path: what the output does, what the importances of the weights add up to,
    what the first order of all together says, and how far that is from what the output does; bounds on that, one for
    each number of pieces; and whether every sample keeps to them.
    """

    change: float
    added: float
    predicted: float
    error: float
    bounds: Sequence[float]
    kept: bool

    def numbers(self) -> list[float]:
        """All but `kept`."""
        return [self.change, self.added, self.predicted, self.error, *self.bounds]


@final
@dataclass(frozen=True)
class TaylorError(Study):
    """weights: how many are taken out one by one, drawn by chance; samples: test cases on which outputs are compared;
    levels: shares of all weights that are taken out at once; pieces: into which a path is cut.
    """

    depth: int = 2
    width: int = 32
    epochs: int = 20
    scored: int = 1000
    samples: int = 200
    weights: int = 150
    levels: list[float] = field(default_factory=lambda: [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
    pieces: list[int] = field(default_factory=lambda: [1, 8, 32])

    def run(self, material: Material, progress: Progress) -> Outcome:
        progress.stage("paths", self.seeds * (self.weights + len(self.levels)))
        single: list[Seen] = []
        joint: list[list[Seen]] = []
        for seed in range(self.seeds):
            bench = self._bench(material, seed)
            trainee = bench.trainee(bench.trained(self.width, self.epochs))
            chance = torch.Generator().manual_seed(seed)
            removal = METHODS["elimination"].look(trainee, bench.parts.train.first(self.scored, 128), chance)
            order = torch.randperm(len(bench.parts.test.x), generator=chance)
            paths = Paths(
                trainee, removal, bench.parts.test.x[order[: self.samples]].double(), self.scored, self.pieces
            )
            for place in torch.randperm(trainee.size, generator=chance)[: self.weights].tolist():
                single.append(paths.seen(paths.one(place)))
                progress.step()
            joint.append([])
            for level in self.levels:
                joint[-1].append(paths.seen(paths.lowest(level)))
                progress.step(f"seed {seed}, {level:g} of all weights: error {joint[-1][-1].error:.2g}")
        return Outcome(self._values(single, joint), self._tables(single, joint), figures(self, single, joint))

    def _bench(self, material: Material, seed: int) -> Bench:
        settings = Elimination(data="diffusion", width=self.width)
        problem = PROBLEMS[settings.data]
        return Bench(settings, problem, problem.parts(material, 0.0, seed), self.depth, seed)

    def _values(self, single: list[Seen], joint: list[list[Seen]]) -> dict[str, float]:
        """single.*: medians over weights; joint.LEVEL.*: means over seeds; kept: no sample is beyond its bound."""
        every = [*single, *(one for several in joint for one in several)]
        found = {
            "kept": float(all(one.kept for one in every)),
            "single.error": median(one.error / one.change for one in single if one.change),
            "single.rank": rank_correlation([one.predicted for one in single], [one.change for one in single]),
        }
        for index, pieces in enumerate(self.pieces):
            found[f"single.bound.{pieces}"] = median(one.bounds[index] / one.error for one in single if one.error)
        for level, several in zip(self.levels, zip(*joint, strict=True), strict=True):
            found[f"joint.{level:g}.change"] = mean(one.change for one in several)
            found[f"joint.{level:g}.added"] = mean(one.added / one.change for one in several)
            found[f"joint.{level:g}.error"] = mean(one.error / one.change for one in several)
            found[f"joint.{level:g}.bound"] = mean(one.bounds[-1] / one.error for one in several)
        return found

    def _tables(self, single: list[Seen], joint: list[list[Seen]]) -> list[Table]:
        columns = ["share of zeros", *named(self.pieces)]
        rows: list[list[Cell]] = [
            [f"{100 * level:g} %", *(spread(several) for several in zip(*map(Seen.numbers, seeds), strict=True))]
            for level, seeds in zip(self.levels, zip(*joint, strict=True), strict=True)
        ]
        alone: list[Cell] = [median(column) for column in zip(*map(Seen.numbers, single), strict=True)]
        title = (
            "Root mean squares: the output's change, what is expected of it, how far the first order is off, its bounds"
        )
        return [Table(f"{title}; mean ± std of {self.seeds} seeds", columns, [["one weight (median)", *alone], *rows])]


@dataclass(frozen=True)
class Paths:
    """Ways from a dense network to a pruned one, all on the same inputs x [N, inputs], float64; scored: samples that
    importances are sums over. What goes is a mask over the weights of all matrices, one after the other.
    """

    trainee: Trainee
    removal: Removal
    x: Tensor
    scored: int
    pieces: Sequence[int]

    @property
    def importances(self) -> Tensor:
        """Of all weights."""
        return torch.cat([self.removal.scores[matrix.name].flatten() for matrix in self.trainee.matrices])

    def one(self, place: int) -> Tensor:
        """One weight goes."""
        return torch.arange(self.trainee.size) == place

    def lowest(self, level: float) -> Tensor:
        """A share of all weights goes, the least important ones."""
        return ~Lowest(round(level * self.trainee.size)).keep(self.importances[None])[0]

    @torch.no_grad()
    def seen(self, gone: Tensor) -> Seen:
        """Along one path."""
        path = self._path(gone)
        start, end = (torch.tensor(xi, dtype=self.x.dtype) for xi in (0.0, 1.0))
        before, slope, *_ = torch.func.jvp(partial(output, path, self.x), (start,), (end,))
        change = output(path, self.x, end) - before
        error = (change - slope).abs()
        bounds = [remainder_bound(path, self.x, pieces) for pieces in self.pieces]
        kept = all(bool((error <= bound + ROUNDING).all()) for bound in bounds)
        added = float((self.importances[gone].sum() / self.scored).sqrt())
        return Seen(rms(change), added, rms(slope), rms(error), [rms(bound) for bound in bounds], kept)

    def _path(self, gone: Tensor) -> list[Moving]:
        parts = torch.split(gone, [weight_of(matrix).numel() for matrix in self.trainee.matrices])
        layers = []
        for matrix, part in zip(self.trainee.matrices, parts, strict=True):
            W, mean_RC = weight_of(matrix).double(), self.removal.means[matrix.name].double()
            D = W * part.view_as(W)
            assert matrix.bias is not None
            layers.append(Moving(W, matrix.bias.detach().double(), D, (D * mean_RC).sum(1)))
        return layers


def figures(study: TaylorError, single: list[Seen], joint: list[list[Seen]]) -> list[Figure]:
    """Single weights, by the change that is predicted for them; and everything over the share of zeros."""
    names = named(study.pieces)
    alone = dict(zip(names, zip(*map(Seen.numbers, single), strict=True), strict=True))
    clouds = {name: (alone["first order"], alone[name]) for name in (names[0], names[3], names[-1])}
    means = [
        [mean(column) for column in zip(*map(Seen.numbers, seeds), strict=True)] for seeds in zip(*joint, strict=True)
    ]
    lines = {name: Line(study.levels, column) for name, column in zip(names, zip(*means, strict=True), strict=True)}
    return [
        Figure("taylor", [
            Dots("one weight at a time", "first order (rms)", "rms over samples", clouds, log_y=True),
            Curves("many weights at once", "share of zeros", "rms over samples", lines, log_y=True),
        ])
    ]  # fmt: skip


def named(pieces: Sequence[int]) -> list[str]:
    """The numbers of `Seen`."""
    bounds = [f"bound, {number} piece{'s' * (number > 1)}" for number in pieces]
    return ["change", "importances added up", "first order", "error", *bounds]


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of numbers that are all different."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
