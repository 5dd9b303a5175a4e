"""Taylor saliency on MNIST-1D ("Iterative Pruning via Taylor Expansion", an experiment without a paper): prune an MLP
step by step, retrain after each step, and see what accuracy is left; against magnitude, first order, OBD and layer-wise
OBS.

Kept from the original: the MLP 40-128-128-10, Adam, batches of 128, scores from 1,000 training signals, 19 steps up to
95 %. Not repeated: sparsities are true shares of the weights; learning rates are tuned on a validation split; several
seeds, each with one dense network that all methods start from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import final

import torch
from torch import Tensor, nn

from obsprune.core.saliency import FirstOrder, Magnitude, OptimalBrainDamage, Taylor
from obsprune.engine.curvature import ASKED, CURVATURES, Trainee
from obsprune.engine.training import Criterion, Layerwise, Masks, Ranked, Retraining, evenly, prune_in_steps
from obsprune.errors import InputError, nearest
from obsprune.models.samples import Batch
from obsprune.progress import Progress, Silent
from obsprune.report.figures import Figure
from obsprune.solvers import build
from obsprune.studies.base import Outcome, Study, spread
from obsprune.studies.material import Labelled, Material
from obsprune.studies.sweep import Sweep

RATES = (1e-5, 1e-2)
"""Learning rates lie between these."""
TUNING = 1000
"""Seed of the network on which learning rates are tuned; no result comes from it."""


@final
@dataclass(frozen=True)
class Nothing(Criterion):
    """No weight goes: what as much training does to the dense network."""

    def prune(self, trainee: Trainee, masks: Masks, sparsity: float, batches: Sequence[Batch]) -> Masks:
        return masks


METHODS: dict[str, Criterion] = {
    "dense": Nothing(),
    "magnitude": Ranked(Magnitude(), CURVATURES["none"]),
    "first-order": Ranked(FirstOrder(), CURVATURES["none"]),
    "taylor": Ranked(Taylor(), CURVATURES["batch"]),
    "taylor-sample": Ranked(Taylor(), CURVATURES["sample"]),
    "taylor-kfac": Ranked(Taylor(), CURVATURES["kfac"]),
    "taylor-exact": Ranked(Taylor(), CURVATURES["gauss-newton"]),
    "obd": Ranked(OptimalBrainDamage(), CURVATURES["gauss-newton"]),
    "obs": Layerwise(build("sparsegpt", {})),
}
"""taylor is the document's; sample, kfac and exact replace its E[g²] over batches. In a ReLU net no unit has a second
derivative, and Gauss–Newton is the exact diagonal."""


@dataclass(frozen=True)
class Signals:
    """Signals [N, 40] and their digits, with the order of an epoch."""

    x: Tensor
    y: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in a new order."""
        for indices in torch.split(torch.randperm(len(self.x), generator=generator), size):
            yield {"x": self.x[indices], ASKED: self.y[indices]}

    def first(self, count: int, size: int) -> list[Batch]:
        """The first ones, in order."""
        parts = zip(torch.split(self.x[:count], size), torch.split(self.y[:count], size), strict=True)
        return [{"x": x, ASKED: y} for x, y in parts]

    def accuracy(self, network: nn.Module) -> float:
        """In percent."""
        with torch.no_grad():
            return 100 * float((network(self.x).argmax(1) == self.y).double().mean())


@dataclass(frozen=True)
class Parts:
    """What is trained on, what learning rates are chosen by, and what is reported."""

    train: Signals
    validation: Signals
    test: Signals

    @classmethod
    def of(cls, data: Labelled, share: float, seed: int) -> Parts:
        """A share of the training signals, drawn anew for each seed, is the validation part."""
        order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
        held, kept = order[: round(share * len(order))], order[round(share * len(order)) :]
        train, validation = (Signals(data.x[part], data.y[part]) for part in (kept, held))
        return cls(train, validation, Signals(data.x_test, data.y_test))


@final
@dataclass(frozen=True)
class TaylorMnist1d(Study):
    """epochs: of the dense network; retrain: after each step; steps: up to `highest`; trials: learning rates that
    Optuna tries for each method (0: none is tuned, `rate` is used); validation: share of the training signals that
    choose them; scored: training signals that scores are measured on.
    """

    seeds: int = 5
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    epochs: int = 5
    retrain: int = 2
    steps: int = 19
    highest: float = 0.95
    trials: int = 15
    rate: float = 1e-3
    batch: int = 128
    scored: int = 1000
    validation: float = 0.2

    def require(self, material: Material) -> None:
        material.mnist1d()

    def run(self, material: Material, progress: Progress) -> Outcome:
        for method in self.methods:
            if method not in METHODS:
                raise InputError(f"settings.methods names '{method}'; {nearest(method, METHODS)}")
        data = material.mnist1d()
        rates = self._tuned(data, progress)
        progress.stage("pruning and retraining", self.seeds * len(self.methods))
        dense: list[float] = []
        runs: dict[str, list[list[float]]] = {method: [] for method in self.methods}
        for seed in range(self.seeds):
            parts = Parts.of(data, self.validation, seed)
            network = self.dense(parts, rates["dense training"], seed)
            dense.append(parts.test.accuracy(network))
            for method in self.methods:
                runs[method].append(self.pruned(network, parts, method, rates[method], seed, parts.test))
                progress.step(f"seed {seed}, {method}: {mean(runs[method][-1]):.1f} % on average")
        sweep = Sweep(self.levels, runs)
        title = f"Test accuracy in %, {self.seeds} seeds, mean ± std; dense {spread(dense)}"
        return Outcome(
            {"dense": mean(dense), **sweep.values()},
            [sweep.table(title, {name: f"{rate:.2g}" for name, rate in rates.items()}), *sweep.comparison()],
            [Figure("accuracy", sweep.panels("MLP 40-128-128-10 on MNIST-1D"))],
            self._facts(data, rates),
        )

    def dense(self, parts: Parts, rate: float, seed: int) -> nn.Module:
        """The network before pruning."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
            )  # fmt: skip
        self._retraining(parts, rate, self.epochs, seed)(_trainee(network), {})
        return network

    def pruned(
        self, dense: nn.Module, parts: Parts, method: str, rate: float, seed: int, judged: Signals
    ) -> list[float]:
        """Accuracy after each step, of a copy of the dense network."""
        network, found = copy.deepcopy(dense), []

        def after(sparsity: float, masks: Masks) -> str:
            found.append(judged.accuracy(network))
            return ""

        retraining = self._retraining(parts, rate, self.retrain, seed)
        scores = parts.train.first(self.scored, self.batch)
        prune_in_steps(_trainee(network), METHODS[method], self.levels, scores, retraining, Silent(), after)
        return found

    @property
    def levels(self) -> list[float]:
        return evenly(self.highest, self.steps)

    def _retraining(self, parts: Parts, rate: float, epochs: int, seed: int) -> Retraining:
        batches = partial(parts.train.batches, self.batch, torch.Generator().manual_seed(seed))
        return Retraining(batches, partial(torch.optim.Adam, lr=rate), epochs)

    def _tuned(self, data: Labelled, progress: Progress) -> dict[str, float]:
        """The learning rate of the dense training, and of each method's retraining, by accuracy on the validation part
        of a network of its own.
        """
        if not self.trials:
            return dict.fromkeys(["dense training", *self.methods], self.rate)
        progress.stage("learning rates", self.trials * (1 + len(self.methods)))
        parts = Parts.of(data, self.validation, TUNING)

        def of_dense(rate: float) -> float:
            return parts.validation.accuracy(self.dense(parts, rate, TUNING))

        rates = {"dense training": best_rate(of_dense, self.trials, progress)}
        dense = self.dense(parts, rates["dense training"], TUNING)

        def of_method(method: str, rate: float) -> float:
            return mean(self.pruned(dense, parts, method, rate, TUNING, parts.validation))

        return rates | {
            method: best_rate(partial(of_method, method), self.trials, progress) if self.retrain else self.rate
            for method in self.methods
        }

    def _facts(self, data: Labelled, rates: Mapping[str, float]) -> dict[str, str]:
        share = f"{self.validation:g} of the training signals, drawn by seed"
        return {
            "data": data.told,
            "validation": f"{share}; it chooses learning rates, test signals choose nothing",
            "learning rates": ", ".join(f"{name} {rate:.2g}" for name, rate in rates.items()),
        }


def best_rate(score: Callable[[float], float], trials: int, progress: Progress) -> float:
    """The learning rate of the highest score among `trials` that Optuna's TPE tries, log-uniform within RATES.

    Raises InputError without Optuna.
    """
    try:
        import optuna
    except ImportError as error:
        raise InputError("learning rates are tuned by Optuna; pip install 'obsprune[recipes]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.Trial) -> float:
        found = float(score(trial.suggest_float("rate", *RATES, log=True)))
        progress.step()
        return found

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials)
    return float(study.best_params["rate"])


def _trainee(network: nn.Module) -> Trainee:
    return Trainee.of(network, lambda batch: network(batch["x"]))
