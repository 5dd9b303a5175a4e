"""Elimination–compensation (arXiv 2602.20467) against magnitude, gradient × weight, chance, and a small network that
was never larger: fully-connected networks, all weights ranked together, everything of one sparsity removed at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import final

import torch
from torch import nn

from obsprune.engine.curvature import Trainee
from obsprune.engine.training import Masks, Retraining
from obsprune.errors import InputError, nearest
from obsprune.progress import Progress
from obsprune.studies.base import Outcome, Study
from obsprune.studies.elimination.data import PROBLEMS, Parts, Problem
from obsprune.studies.elimination.methods import METHODS, Method
from obsprune.studies.elimination.results import Case, Judged, figures
from obsprune.studies.material import Material

SMALL, AGAIN = "small", "-again"
"""The row of a network with as many parameters as are left, trained from scratch; and the ending of methods that look
again at each level, at the network they have pruned so far."""


@final
@dataclass(frozen=True)
class Elimination(Study):
    """data: a problem of data.PROBLEMS; depths: hidden layers of the networks; methods: those of
    methods.METHODS, also with `-again`, and `small`; epochs: of the dense network; tuning: epochs after
    pruning, for a second case at tuned_levels (0: none); scored: training cases that methods look at.
    """

    seeds: int = 3
    data: str = "mnist"
    depths: list[int] = field(default_factory=lambda: [2])
    width: int = 100
    noises: list[float] = field(default_factory=lambda: [0.0])
    methods: list[str] = field(default_factory=lambda: ["random", "magnitude", "gradient", SMALL, "elimination"])
    levels: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    tuned_levels: list[float] = field(default_factory=lambda: [0.5, 0.8, 0.9, 0.95])
    epochs: int = 10
    tuning: int = 2
    batch: int = 128
    rate: float = 1e-3
    scored: int = 1000

    def require(self, material: Material) -> None:
        self._problem().require(material)

    def run(self, material: Material, progress: Progress) -> Outcome:
        problem, schedules = self._problem(), self._schedules()
        for method in self.methods:
            if method != SMALL:
                method_of(method)
        plans = list(product(self.depths, self.noises, schedules))
        progress.stage(f"networks on {self.data}", len(plans) * self.seeds * len(self.methods))
        cases = [self._case(problem, material, *plan, progress) for plan in plans]
        values = {name: value for case in cases for name, value in case.values().items()}
        facts = {"data": problem.told, "score": problem.score}
        return Outcome(values, [case.table(problem.score) for case in cases], figures(cases), facts)

    def _case(
        self, problem: Problem, material: Material, depth: int, noise: float, tuning: int, progress: Progress
    ) -> Case:
        """One depth and noise, with or without fine-tuning."""
        levels = self.tuned_levels if tuning else self.levels
        case = Case(depth, noise, tuning, levels)
        for seed in range(self.seeds):
            bench = Bench(self, problem, problem.parts(material, noise, seed), depth, seed)
            dense = bench.trained(self.width, self.epochs)
            case.dense.append(bench.judged(dense))
            for method in self.methods:
                found = list(bench.follow(dense, method, levels, tuning))
                case.runs.setdefault(method, []).append(found)
                progress.step(f"{case.title}, seed {seed}, {method}: loss {found[-1].loss:.3g} at {levels[-1]:g}")
        return case

    def _problem(self) -> Problem:
        if self.data not in PROBLEMS:
            raise InputError(f"settings.data is '{self.data}'; {nearest(self.data, PROBLEMS)}")
        return PROBLEMS[self.data]

    def _schedules(self) -> list[int]:
        """Epochs after pruning."""
        return [0, self.tuning] if self.tuning else [0]


@dataclass(frozen=True)
class Bench:
    """One seed's data, and the networks of one depth."""

    study: Elimination
    problem: Problem
    parts: Parts
    depth: int
    seed: int

    def trained(self, width: int, epochs: int) -> nn.Sequential:
        """From scratch."""
        network = self.problem.network(self.depth, width, self.seed)
        self.train(self.trainee(network), {}, epochs)
        return network

    def train(self, trainee: Trainee, masks: Masks, epochs: int) -> None:
        """Adam; what the masks have pruned stays zero."""
        batches = partial(self.parts.train.batches, self.study.batch, torch.Generator().manual_seed(self.seed))
        Retraining(batches, partial(torch.optim.Adam, lr=self.study.rate), epochs)(trainee, masks)

    def trainee(self, network: nn.Sequential) -> Trainee:
        """The network with its loss."""
        return Trainee.of(network, lambda batch: network(batch["x"]), self.problem.loss)

    @torch.no_grad()
    def judged(self, network: nn.Module) -> Judged:
        """On the test part."""
        z, y = network(self.parts.test.x), self.parts.test.y
        return Judged(float(self.problem.loss(z, y)), self.problem.scored(z, y))

    def follow(self, dense: nn.Sequential, method: str, levels: list[float], tuning: int) -> Iterator[Judged]:
        """What a method leaves at each level."""
        if method == SMALL:
            yield from (self._small(level, tuning) for level in levels)
        elif method.endswith(AGAIN):
            yield from self._step_by_step(dense, method_of(method), levels, tuning)
        else:
            yield from self._at_once(dense, method_of(method), levels, tuning)

    def _at_once(self, dense: nn.Sequential, method: Method, levels: list[float], tuning: int) -> Iterator[Judged]:
        removal = method.look(self.trainee(dense), self._looked_at(), self._chance())
        for level in levels:
            trainee = self.trainee(copy.deepcopy(dense))
            yield self._tuned(trainee, removal.carry_out(trainee, level), tuning)

    def _step_by_step(self, dense: nn.Sequential, method: Method, levels: list[float], tuning: int) -> Iterator[Judged]:
        trainee, chance = self.trainee(copy.deepcopy(dense)), self._chance()
        for level in levels:
            masks = method.look(trainee, self._looked_at(), chance).carry_out(trainee, level)
            yield self._tuned(trainee, masks, tuning)

    def _tuned(self, trainee: Trainee, masks: Masks, epochs: int) -> Judged:
        self.train(trainee, masks, epochs)
        return self.judged(trainee.network)

    def _small(self, level: float, tuning: int) -> Judged:
        """The width whose parameters come nearest to those left: weights that survive, and all biases."""
        dense = self.problem.parameters(self.depth, self.study.width)
        biases = self.depth * self.study.width + self.problem.outputs
        left = round((1 - level) * (dense - biases)) + biases
        widths = range(1, self.study.width + 1)
        width = min(widths, key=lambda width: abs(self.problem.parameters(self.depth, width) - left))
        return self.judged(self.trained(width, self.study.epochs + tuning))

    def _looked_at(self) -> list[dict[str, torch.Tensor]]:
        return self.parts.train.first(self.study.scored, self.study.batch)

    def _chance(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def method_of(name: str) -> Method:
    """By its name, with or without `-again`. Raises InputError."""
    plain = name.removesuffix(AGAIN)
    if plain not in METHODS:
        raise InputError(f"settings.methods names '{name}'; {nearest(plain, [*METHODS, SMALL])}")
    return METHODS[plain]
