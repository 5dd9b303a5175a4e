"""Directional pruning in practice: networks trained by gRDA beside SGD from the same start on the same batches; how
sparse, how accurate, where the zeros are, and whether a curve of low loss joins both ends (Chao et al. 2020).

The paper's claims: gRDA's networks are sparse and as accurate as SGD's without any retraining; μ steers how sparse;
both lie in one valley. Beside it what the paper leaves out: SGD's network pruned by magnitude to as many zeros, as it
is and with some retraining.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import nn

from obsprune.core.grda import GRDA
from obsprune.errors import InputError, nearest
from obsprune.progress import Progress
from obsprune.studies.base import Outcome, Study
from obsprune.studies.directional.bench import GROUNDS, Bench, Found
from obsprune.studies.directional.bezier import Bezier, along, trained
from obsprune.studies.directional.report import Compared, Story, Ways
from obsprune.studies.material import Material

OTHER = 1000
"""The start of the other SGD, beside the seed."""


@dataclass(frozen=True)
class Seed:
    """What came out of one seed; runs in the order of the settings."""

    sgd: Found
    runs: list[Compared]
    ways: Mapping[str, Ways]


@final
@dataclass(frozen=True)
class Directional(Study):
    """data: mnist1d or mnist; runs: c and μ of each gRDA; rate: γ of all at first (bench.falling); retrain:
    epochs that SGD's network gets after it is pruned; joined: which of the runs a curve joins to SGD's network, trained
    for `curve` epochs at `curve_rate`; places: where it is looked at.
    Values: sgd.test, .train, .loss; of each run cC.muM.zeros, .test, .train, .loss, .magnitude and .retrained (test
    accuracies of SGD's network with as many zeros), .drop (points below SGD). From SGD to gRDA, and as a control to SGD
    from another start: grda.curve.loss, other.line.loss and so on, the highest training loss between the ends, and
    grda.ends.loss that of the ends; .error the same of test errors in percent.
    """

    data: str = "mnist1d"
    seeds: int = 3
    runs: list[list[float]] = field(default_factory=lambda: [[0.004, 0.51], [0.004, 0.6], [0.004, 0.75], [0.004, 0.9]])
    epochs: int = 200
    rate: float = 0.1
    batch: int = 128
    retrain: int = 20
    joined: int = 2
    curve: int = 40
    curve_rate: float = 0.02
    places: int = 21

    def require(self, material: Material) -> None:
        if self.data not in GROUNDS:
            raise InputError(f"settings.data is '{self.data}'; {nearest(self.data, GROUNDS)}")
        if not 0 <= self.joined < len(self.runs) or any(len(run) != 2 for run in self.runs):
            raise InputError("settings.runs: pairs of c and mu are expected, and settings.joined is the number of one")
        if self.places < 3:
            raise InputError(f"settings.places is {self.places}; 3 or more are expected: both ends and one between")
        GROUNDS[self.data].read(material)

    def run(self, material: Material, progress: Progress) -> Outcome:
        data = GROUNDS[self.data].read(material)
        progress.stage("training", self.seeds * (len(self.runs) + 2))
        benches = [Bench.of(data, self.batch, seed) for seed in range(self.seeds)]
        found = [self._seed(bench, progress) for bench in benches]
        runs = {name(c, mu): [one.runs[place] for one in found] for place, (c, mu) in enumerate(self.runs)}
        story = Story(
            [one.sgd for one in found], runs, [one.ways for one in found], name(*self.runs[self.joined]), self._places
        )
        counted = "of the weights of all layers; gRDA sets biases to zero, too, which are not counted"
        return story.outcome({"data": data.told, "zeros": counted})

    def _seed(self, bench: Bench, progress: Progress) -> Seed:
        start, sgd = bench.start(GROUNDS[self.data].widths), partial(torch.optim.SGD, lr=self.rate)
        dense = bench.trained(start, sgd, self.epochs)
        progress.step(f"seed {bench.seed}, SGD: {bench.test.accuracy(dense):.1f} %")
        ends, runs = [], []
        for c, mu in self.runs:
            ends.append(bench.trained(start, partial(GRDA, lr=self.rate, c=c, mu=mu), self.epochs))
            runs.append(self._compared(bench, dense, ends[-1]))
            told = f"{100 * runs[-1].grda.zeros:.1f} % zeros, {runs[-1].grda.test:.1f} %"
            progress.step(f"seed {bench.seed}, {name(c, mu)}: {told}")
        other = bench.trained(bench.start(GROUNDS[self.data].widths, OTHER), sgd, self.epochs)
        ways = {"grda": self._ways(bench, dense, ends[self.joined]), "other": self._ways(bench, dense, other)}
        progress.step(f"seed {bench.seed}, curves")
        return Seed(bench.found(dense), runs, ways)

    @property
    def _places(self) -> list[float]:
        return [place / (self.places - 1) for place in range(self.places)]

    def _compared(self, bench: Bench, dense: nn.Module, grda: nn.Module) -> Compared:
        own, pruned = bench.found(grda), copy.deepcopy(dense)
        masks = bench.magnitude(pruned, own.zeros)
        again = bench.trained(pruned, partial(torch.optim.SGD, lr=self.rate), self.retrain, masks)
        return Compared(own, bench.found(pruned), bench.found(again))

    def _ways(self, bench: Bench, dense: nn.Module, grda: nn.Module) -> dict[str, list[float]]:
        """Training loss and test error along the straight line and the trained curve, by name."""
        line = Bezier.straight(dense, grda)
        random = torch.Generator().manual_seed(bench.seed)
        epoch = partial(bench.train.batches, bench.batch, random)
        curve = trained(line, dense, epoch, self.curve, self.curve_rate, random)
        measures = {"loss": bench.train_loss, "error": lambda network: 100 - bench.test.accuracy(network)}
        return {
            f"{way}.{what}": along(one, dense, self._places, measure)
            for way, one in (("line", line), ("curve", curve))
            for what, measure in measures.items()
        }


def name(c: float, mu: float) -> str:
    """Of a run, as its values begin."""
    return f"c{c:g}.mu{mu:g}"
