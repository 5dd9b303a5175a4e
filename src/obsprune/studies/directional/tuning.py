"""gRDA as a sparse fine-tuning optimizer for pretrained models, which the paper does not try: zeros and quality after
some passes, beside pruning to as many zeros, as it is and with as many passes of Adam with the mask kept.

gRDA starts from the pretrained weights and gets no mask: it is to find the zeros itself. Norms and biases have c = 0.
The learning rate of every method falls to 0 along a cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import final

import torch
from torch import nn

from obsprune.core.grda import GRDA
from obsprune.core.optimizers import cosine
from obsprune.core.saliency import Magnitude
from obsprune.engine.curvature import CURVATURES
from obsprune.engine.training import Criterion, Layerwise, Masks, Ranked, Retraining
from obsprune.errors import InputError, nearest
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Dots, Figure, Line
from obsprune.solvers import build
from obsprune.studies.base import Cell, Outcome, Study, Table, spread
from obsprune.studies.directional.networks import name
from obsprune.studies.directional.subjects import SUBJECTS, Patient
from obsprune.studies.material import Material

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
PRUNERS: dict[str, tuple[Criterion, int]] = {
    "magnitude": (Ranked(Magnitude(), CURVATURES["none"]), 1),
    "sparsegpt": (Layerwise(build("sparsegpt", {})), 64),
}
"""What the sparsity of gRDA is compared with, and at how many batches at most each looks."""


@dataclass(frozen=True)
class Trial:
    """One gRDA run: its zeros, in all and by matrix, what is judged of it, and of the others with as many zeros."""

    zeros: float
    layers: Sequence[float]
    judged: Mapping[str, float]


@final
@dataclass(frozen=True)
class Tuning(Study):
    """subject: stories260k or deit-tiny; runs: c and μ of each gRDA; rate: its γ, and that of SGD; adam: the learning
    rate of Adam; pruners: what gRDA is compared with, magnitude and sparsegpt; samples: trained on; judged: judged by;
    passes: over the samples.
    Values: dense; sgd and adam, the dense model trained as long; of each run cC.muM.zeros, .grda, .magnitude and
    .sparsegpt, .magnitude.adam and .sparsegpt.adam; .grda.adam, gRDA's mask kept and as many passes more.
    """

    subject: str = "stories260k"
    runs: list[list[float]] = field(default_factory=lambda: [[0.02, 0.6], [0.05, 0.6], [0.1, 0.6]])
    rate: float = 0.1
    adam: float = 1e-3
    pruners: list[str] = field(default_factory=lambda: list(PRUNERS))
    samples: int = 1024
    judged: int = 128
    batch: int = 4
    passes: int = 1

    def require(self, material: Material) -> None:
        if self.subject not in SUBJECTS:
            raise InputError(f"settings.subject is '{self.subject}'; {nearest(self.subject, SUBJECTS)}")
        for pruner in self.pruners:
            if pruner not in PRUNERS:
                raise InputError(f"settings.pruners names '{pruner}'; {nearest(pruner, PRUNERS)}")
        SUBJECTS[self.subject].require(material)

    def run(self, material: Material, progress: Progress) -> Outcome:
        subject = SUBJECTS[self.subject]
        progress.stage(f"tuning {self.subject}", self.seeds * (2 + len(self.runs)))
        controls: list[dict[str, float]] = []
        trials: dict[str, list[Trial]] = {name(*run): [] for run in self.runs}
        for seed in range(self.seeds):
            with subject.opened(material, self.samples, self.judged, self.batch, seed) as patient:
                controls.append({"dense": patient.judge(), **self._controls(patient, seed, progress)})
                for c, mu in self.runs:
                    trials[name(c, mu)].append(self._trial(patient, c, mu, seed))
                    progress.step(_told(name(c, mu), trials[name(c, mu)][-1]))
        updates = self.passes * -(-self.samples // self.batch)
        facts = {
            "model": f"{self.subject}, {subject.metric} on {self.judged} samples it was not trained on",
            "training": f"{updates} steps of {self.batch} samples for each method",
        }
        return Outcome(
            _values(controls, trials),
            [_table(subject.metric, controls, trials)],
            [_figure(subject.metric, controls, trials)],
            facts,
        )

    def _controls(self, patient: Patient, seed: int, progress: Progress) -> dict[str, float]:
        found = {}
        for title, optimizer in (("sgd", partial(torch.optim.SGD, lr=self.rate)), ("adam", self._adam)):
            with patient.kept():
                self._train(patient, optimizer, seed, {})
                found[title] = patient.judge()
            progress.step(f"{title}: {found[title]:.4g}")
        return found

    def _trial(self, patient: Patient, c: float, mu: float, seed: int) -> Trial:
        judged = {}
        with patient.kept():
            self._train(patient, partial(sparse_descent, rate=self.rate, c=c, mu=mu), seed, {})
            judged["grda"], zeros, layers = patient.judge(), patient.zeros, patient.layers()
            self._train(patient, self._adam, seed, patient.masks())
            judged["grda.adam"] = patient.judge()
        for title in self.pruners:
            criterion, seen = PRUNERS[title]
            with patient.kept():
                masks = criterion.prune(patient.trainee, {}, zeros, patient.train[:seen])
                judged[title] = patient.judge()
                self._train(patient, self._adam, seed, masks)
                judged[f"{title}.adam"] = patient.judge()
        return Trial(zeros, layers, judged)

    def _adam(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.adam)

    def _train(self, patient: Patient, optimizer: Optimizer, seed: int, masks: Masks) -> None:
        batches = partial(patient.epoch, torch.Generator().manual_seed(seed))
        Retraining(batches, optimizer, self.passes, cosine, batches_an_epoch=len(patient.train))(patient.trainee, masks)


def sparse_descent(parameters: list[nn.Parameter], rate: float, c: float, mu: float) -> GRDA:
    """gRDA that leaves norms and biases dense."""
    matrices = {"params": [one for one in parameters if one.ndim > 1], "c": c}
    vectors = {"params": [one for one in parameters if one.ndim <= 1], "c": 0.0}
    return GRDA([matrices, vectors], lr=rate, mu=mu)


def _told(title: str, trial: Trial) -> str:
    return f"{title}: {100 * trial.zeros:.1f} % zeros, " + ", ".join(f"{k} {v:.4g}" for k, v in trial.judged.items())


def _values(controls: Sequence[Mapping[str, float]], trials: Mapping[str, Sequence[Trial]]) -> dict[str, float]:
    values = {title: mean(one[title] for one in controls) for title in controls[0]}
    for title, several in trials.items():
        values[f"{title}.zeros"] = mean(one.zeros for one in several)
        for method in several[0].judged:
            values[f"{title}.{method}"] = mean(one.judged[method] for one in several)
    return values


def _table(metric: str, controls: Sequence[Mapping[str, float]], trials: Mapping[str, Sequence[Trial]]) -> Table:
    methods = list(next(iter(trials.values()))[0].judged)
    told = ", ".join(f"{title} {spread([one[title] for one in controls])}" for title in controls[0])
    rows: list[list[Cell]] = [
        [
            title,
            spread([100 * one.zeros for one in several]),
            *(spread([one.judged[method] for one in several]) for method in methods),
        ]
        for title, several in trials.items()
    ]
    return Table(f"{metric}, with no zeros: {told}", ["run", "zeros, %", *methods], rows)


def _figure(metric: str, controls: Sequence[Mapping[str, float]], trials: Mapping[str, Sequence[Trial]]) -> Figure:
    runs = [one for several in trials.values() for one in several]
    clouds: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        method: ([one.zeros for one in runs], [one.judged[method] for one in runs]) for method in runs[0].judged
    }
    clouds["sgd, adam"] = ([0.0] * 2 * len(controls), [one[title] for one in controls for title in ("sgd", "adam")])
    layers = {title: Line(range(len(several[0].layers)), several[0].layers) for title, several in trials.items()}
    log = metric == "perplexity"
    return Figure(
        "tuning",
        [
            Dots("every model", "share of zeros", metric, clouds, log_y=log),
            Curves("zeros by matrix, gRDA", "matrix", "share of zeros", layers),
        ],
    )
