"""Directional pruning on the paper's own ground: VGG16, WRN28x10 and ResNet50 trained from scratch by SGD and by gRDA
from the same start on the same batches (Chao et al. 2020), for people with a GPU and the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from obsprune.core.grda import GRDA
from obsprune.engine.curvature import ASKED, Trainee
from obsprune.engine.training import Retraining
from obsprune.errors import InputError, nearest
from obsprune.models.samples import Batch
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Dots, Figure, Line
from obsprune.studies.base import Cell, Outcome, Study, Table, spread
from obsprune.studies.directional.convolutional import NETWORKS
from obsprune.studies.directional.networks import name
from obsprune.studies.directional.photographs import VIEWS, Album, Part
from obsprune.studies.material import Material


def share(schedule: Sequence[Sequence[float]], epoch: float) -> float:
    """Of the learning rate: linear between the points (epoch, share), the first one's before and the last one's after
    them; two points at one epoch are a step.
    """
    past = [point for point in schedule if point[0] <= epoch]
    future = [point for point in schedule if point[0] > epoch]
    if not (past and future):
        return (past[-1:] or future[:1])[0][1]
    (start, high), (end, low) = past[-1], future[0]
    return high + (low - high) * (epoch - start) / (end - start)


Step = Callable[[], None]


@dataclass(frozen=True)
class End:
    """Of a trained network: shares of zeros of all weights and of each layer's, the last epoch's mean loss in training
    and the test accuracy in %.
    """

    zeros: float
    layers: list[float]
    loss: float
    test: float


@final
@dataclass(frozen=True)
class Images(Study):
    """network: one of NETWORKS, of a `width`; data: a folder in that of --data, with train/CLASS/IMAGE and
    val/CLASS/IMAGE, "" for drawn images; augment: one of VIEWS, to `size`; mean, deviation: of the colours, which
    go from 0 to 1; rate: γ at first, which follows `schedule`; runs: c and μ of each gRDA.
    Values: sgd.test, sgd.loss; of each run cC.muM.zeros, .test, .loss, .drop (points of test accuracy below SGD).
    """

    network: str = "vgg16"
    width: int = 64
    data: str = ""
    size: int = 32
    augment: str = "padded"
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    deviation: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    epochs: int = 600
    batch: int = 128
    rate: float = 0.1
    schedule: list[list[float]] = field(default_factory=lambda: [[0, 1]])
    runs: list[list[float]] = field(default_factory=lambda: [[5e-4, 0.51]])
    workers: int = 4

    def require(self, material: Material) -> None:
        for key, known in (("network", NETWORKS), ("augment", VIEWS)):
            if getattr(self, key) not in known:
                raise InputError(f"settings.{key} is '{getattr(self, key)}'; {nearest(getattr(self, key), known)}")
        if not self.schedule or any(len(pair) != 2 for pair in [*self.runs, *self.schedule]):
            raise InputError("settings.runs: pairs of c and mu are expected, in schedule pairs of an epoch and a share")
        if self.data:
            self._album(material)

    def run(self, material: Material, progress: Progress) -> Outcome:
        album = self._album(material)
        progress.stage("training", self.seeds * (1 + len(self.runs)) * self.epochs)
        methods: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {"SGD": partial(torch.optim.SGD, lr=self.rate)}
        methods |= {name(c, mu): partial(GRDA, lr=self.rate, c=c, mu=mu) for c, mu in self.runs}
        ends: dict[str, list[End]] = {method: [] for method in methods}
        for seed in range(self.seeds):
            for method, optimizer in methods.items():
                end = self._end(album, optimizer, seed, progress.step)
                progress.line(f"seed {seed}, {method}: {100 * end.zeros:.2f} % zeros, {end.test:.2f} %")
                ends[method].append(end)
        told = f"{len(album.train)} images to train on, {len(album.test)} to test, {album.classes} classes"
        facts = {"data": f"{self.data or 'drawn'}: {told}", "device": str(_device()), "zeros": "of all layers' weights"}
        return outcome(ends.pop("SGD"), ends, facts)

    def _album(self, material: Material) -> Album:
        view = partial(VIEWS[self.augment], self.size)
        return Album.read(material, self.data, view) if self.data else Album.drawn(2 * self.batch, self.size, view)

    def _end(self, album: Album, optimizer: Callable[[list[nn.Parameter]], Optimizer], seed: int, step: Step) -> End:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # of the start, then of dropout
            network = NETWORKS[self.network](album.classes, self.width).to(_device())
            random = torch.Generator().manual_seed(seed)
            loss = Retraining(
                lambda: self._normalised(album.train.epoch(random, self.batch, self.workers)),
                optimizer,
                self.epochs,
                lambda done: share(self.schedule, round(done * self.epochs, 6)),
            )(Trainee.of(network, lambda batch: network(batch["x"])), {}, step)
        matrices = [one.detach() for one in network.parameters() if one.ndim > 1]
        layers = [float((one == 0).double().mean()) for one in matrices]
        gone = sum(int((one == 0).sum()) for one in matrices)
        return End(gone / sum(one.numel() for one in matrices), layers, loss, self._accuracy(network, album.test))

    def _normalised(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """On the device."""
        mean, deviation = (torch.tensor(one, device=_device()).view(3, 1, 1) for one in (self.mean, self.deviation))
        for images, classes in batches:
            yield {"x": (images.to(_device()).float() / 255 - mean) / deviation, ASKED: classes.to(_device())}

    @torch.no_grad()
    def _accuracy(self, network: nn.Module, part: Part) -> float:
        batches = self._normalised(part.plain(self.batch, self.workers))
        return 100 * sum(int((network(one["x"]).argmax(1) == one[ASKED]).sum()) for one in batches) / len(part)


def outcome(sgd: Sequence[End], runs: Mapping[str, Sequence[End]], facts: Mapping[str, str]) -> Outcome:
    """Values, tables and the figure; lists are over seeds."""
    values = {f"sgd.{what}": mean(getattr(one, what) for one in sgd) for what in ("test", "loss")}
    rows: list[list[Cell]] = [["SGD", *_cells(sgd)]]
    layers: list[list[Cell]] = []
    for run, ends in runs.items():
        values |= {f"{run}.{what}": mean(getattr(one, what) for one in ends) for what in ("zeros", "test", "loss")}
        values[f"{run}.drop"] = values["sgd.test"] - values[f"{run}.test"]
        rows.append([run, *_cells(ends)])
        layers += [[run, number, spread([100 * s for s in shares])] for number, shares in enumerate(_columns(ends), 1)]
    tables = [
        Table(f"{len(sgd)} seeds", ["run", "zeros, %", "training loss", "test, %"], rows),
        Table("Zeros by layer", ["run", "layer", "zeros, %"], layers),
    ]
    clouds = {
        run: ([one.zeros for one in ends], [one.test for one in ends]) for run, ends in {"SGD": sgd, **runs}.items()
    }
    lines = {
        run: Line(range(1, len(ends[0].layers) + 1), [mean(s) for s in _columns(ends)]) for run, ends in runs.items()
    }
    dots = Dots("every network", "share of zeros", "test accuracy, %", clouds)
    figure = Figure("accuracy", [dots, Curves("zeros by layer, gRDA", "layer", "share of zeros", lines)])
    return Outcome(values, tables, [figure], facts)


def _columns(ends: Sequence[End]) -> list[tuple[float, ...]]:
    """Shares of zeros of each layer, over seeds."""
    return list(zip(*(one.layers for one in ends), strict=True))


def _cells(ends: Sequence[End]) -> list[Cell]:
    zeros = spread([100 * one.zeros for one in ends])
    return [zeros, *(spread([getattr(one, what) for one in ends]) for what in ("loss", "test"))]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
