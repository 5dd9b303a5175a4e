"""Elimination–compensation on pretrained convolutions and transformers, alone and on top of layer solvers: what the
paper leaves open. All matrices of the dense model are looked at once, and pruned independently of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import final

import torch
from torch import Tensor, nn

from obsprune.core.elimination import Heard, Sketch
from obsprune.core.losses import agreement, divergence, log_probabilities
from obsprune.core.patterns import Unstructured
from obsprune.core.statistics import Gram
from obsprune.engine.curvature import ASKED, Trainee
from obsprune.engine.training import measure
from obsprune.errors import InputError, nearest
from obsprune.models.data import draw
from obsprune.models.kinds import Wish
from obsprune.models.load import Model, load
from obsprune.models.matrices import Matrix, differentiated
from obsprune.models.samples import Batch
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Figure, Line
from obsprune.solvers import build
from obsprune.solvers.base import AnySolver
from obsprune.studies.base import Cell, Outcome, Study, Table
from obsprune.studies.elimination.methods import Removal, listen, weight_of
from obsprune.studies.elimination.results import Judged
from obsprune.studies.material import Material

DATA = {"images": "imagenet-sample/labels.tsv", "text": "text/tinystories-calibration.txt"}
"""What a model is calibrated and judged with, by what it reads."""


@dataclass(frozen=True)
class Look:
    """What is known of a dense model: the Gram of every matrix's inputs, and what its outputs hear of them."""

    trainee: Trainee
    grams: Mapping[str, Gram]
    heard: Mapping[str, Heard]


Means = Callable[[Look, str], Tensor]
"""How much the bias of a matrix grows for every unit of weight that goes [R, C]."""


def of_inputs(look: Look, name: str) -> Tensor:
    """The mean input: the layer's own output keeps its mean."""
    return look.grams[name].mean_C.expand(look.heard[name].mean_RC.shape)


def as_heard(look: Look, name: str) -> Tensor:
    """The mean over samples that count as the model's outputs hear them: the paper's."""
    return look.heard[name].mean_RC.float()


class Way(ABC):
    """From a dense model to a sparse one, in place."""

    @abstractmethod
    def prune(self, look: Look, sparsity: float) -> None:
        """Every matrix loses this share, or all together do."""


@final
@dataclass(frozen=True)
class Solved(Way):
    """By a layer solver. means: the bias takes δ = Σ_c D_rc mean_rc for the difference D, in the place of the solver's
    own.
    """

    solver: AnySolver
    means: Means | None = None

    def prune(self, look: Look, sparsity: float) -> None:
        for matrix in look.trainee.matrices:
            dense_RC = matrix.read()
            state = self.solver.prepare(look.grams[matrix.name])
            solution = self.solver.solve(dense_RC, state, Unstructured(sparsity))
            shift_R = solution.bias_shift
            if self.means:
                shift_R = ((dense_RC - solution.weight) * self.means(look, matrix.name)).sum(1)
            matrix.write(solution.weight)
            if shift_R is not None:
                bias_of(matrix)[matrix.rows] += shift_R


@final
@dataclass(frozen=True)
class Ranked(Way):
    """By elimination–compensation's importance; without means, that for biases that stay. together: all matrices are
    one list.
    """

    means: Means | None = as_heard
    together: bool = False

    def prune(self, look: Look, sparsity: float) -> None:
        matrices = look.trainee.matrices
        for group in [matrices] if self.together else [[matrix] for matrix in matrices]:
            self._removal(look, group).carry_out(replace(look.trainee, matrices=group), sparsity)

    def _removal(self, look: Look, group: Sequence[Matrix]) -> Removal:
        if self.means is None:
            plain = {matrix.name: look.heard[matrix.name].uncompensated(weight_of(matrix)) for matrix in group}
            return Removal(plain, plain).without_bias()
        scores = {matrix.name: look.heard[matrix.name].importance(weight_of(matrix)) for matrix in group}
        return Removal(scores, {matrix.name: self.means(look, matrix.name) for matrix in group})


WAYS: dict[str, Way] = {
    "magnitude": Solved(build("magnitude", {})),
    "bias-stays": Ranked(None),
    "elimination": Ranked(),
    "elimination-mean": Ranked(of_inputs),
    "elimination-together": Ranked(together=True),
    "wanda": Solved(build("wanda", {})),
    "wanda-centred": Solved(build("wanda", {"compensate": True})),
    "wanda-heard": Solved(build("wanda", {}), as_heard),
    "sparsegpt": Solved(build("sparsegpt", {})),
    "sparsegpt-centred": Solved(build("sparsegpt", {"compensate": True})),
    "sparsegpt-heard": Solved(build("sparsegpt", {}), as_heard),
    "admm": Solved(build("admm", {})),
    "admm-centred": Solved(build("admm", {"compensate": True})),
}
"""elimination: the share of each matrix; -mean: its weights, and biases that take the mean input; -together: all
matrices in one list. -centred: the solver sees the centred Gram, and the bias takes the lost mean (compensated.py);
wanda-centred is elimination–compensation with the layer's own output in the place of the model's. -heard: the solver as
it is, and the paper's biases."""


@final
@dataclass(frozen=True)
class PretrainedElimination(Study):
    """models: folders of the material; calibration, judged: images, or sequences of `seqlen` tokens; batch: of one
    pass; ways: those of WAYS.
    """

    models: list[str] = field(default_factory=lambda: ["mobilenet-v1-050-160", "deit-tiny", "stories260k"])
    sparsities: list[float] = field(default_factory=lambda: [0.5, 0.7])
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    calibration: int = 128
    judged: int = 128
    seqlen: int = 256
    batch: int = 16

    def require(self, material: Material) -> None:
        for name in self.models:
            material.require(f"{name}/config.json", f"the model {name}")

    def run(self, material: Material, progress: Progress) -> Outcome:
        for way in self.ways:
            if way not in WAYS:
                raise InputError(f"settings.ways names '{way}'; {nearest(way, WAYS)}")
        progress.stage("pretrained models", self.seeds * len(self.models) * len(self.ways) * len(self.sparsities))
        found = {name: self._runs(name, material, progress) for name in self.models}
        values = {
            f"{name}.{way}.{what}.{sparsity:g}": mean(getattr(one, part) for one in runs)
            for name, ways in found.items()
            for way, levels in ways.items()
            for sparsity, runs in zip(self.sparsities, levels, strict=True)
            for what, part in (("kl", "loss"), ("same", "score"))
        }
        return Outcome(values, [self._table(name, ways) for name, ways in found.items()], [self._figure(found)])

    def _runs(self, name: str, material: Material, progress: Progress) -> dict[str, list[list[Judged]]]:
        """{way: [sparsity][seed]}."""
        runs: dict[str, list[list[Judged]]] = {way: [[] for _ in self.sparsities] for way in self.ways}
        model = load(str(material.require(f"{name}/config.json", name).parent), device="cpu")
        with model.loaded(), biases(model.matrices):
            for seed in range(self.seeds):
                calibration, judged = self._drawn(model, material, seed)
                look = looked(model, calibration, seed)
                goal = answers(look.trainee, judged)
                for way in self.ways:
                    for place, sparsity in enumerate(self.sparsities):
                        with kept(model.matrices):
                            WAYS[way].prune(look, sparsity)
                            runs[way][place].append(compared(answers(look.trainee, judged), goal))
                        progress.step(f"{name}, {way}, {sparsity:g}: {runs[way][place][-1].loss:.3g}")
        return runs

    def _drawn(self, model: Model, material: Material, seed: int) -> tuple[list[Batch], list[Batch]]:
        path = material.require(DATA[model.kind.reads], f"what {model.kind.reads} are calibrated with")
        dataset = f"imagenet={path}" if model.kind.reads == "images" else str(path)
        drawn = draw(model.open(Wish(dataset, self.seqlen, None))[0], self.calibration, self.judged, seed)
        calibration, judged = (model.batches(part, self.batch) for part in (drawn.calibration, drawn.heldout))
        return calibration, judged

    def _table(self, name: str, ways: Mapping[str, list[list[Judged]]]) -> Table:
        rows: list[list[Cell]] = [
            [way, *(cell for runs in levels for cell in (mean(r.loss for r in runs), mean(r.score for r in runs)))]
            for way, levels in ways.items()
        ]
        columns = ["way", *(f"{what} {100 * s:g} %" for s in self.sparsities for what in ("KL", "same answer, %,"))]
        return Table(f"{name}: KL(dense ‖ pruned) in nats on held-out data, mean of {self.seeds} seeds", columns, rows)

    def _figure(self, found: Mapping[str, Mapping[str, list[list[Judged]]]]) -> Figure:
        panels = [
            Curves(name, "share of zeros", "KL(dense ‖ pruned), nats",
                   {way: Line(self.sparsities, [mean(r.loss for r in runs) for runs in levels])
                    for way, levels in ways.items()}, log_y=True)
            for name, ways in found.items()
        ]  # fmt: skip
        return Figure("models", panels)


def looked(model: Model, batches: Sequence[Batch], seed: int) -> Look:
    """One pass for the Grams, one forward and backward for what the outputs hear."""

    def logits(batch: Batch) -> Tensor:
        outputs = model.network(**{name: x for name, x in batch.items() if name != ASKED})
        found: Tensor = outputs.logits
        return found

    trainee = Trainee(model.network, model.matrices, logits)
    asked = [{**batch, ASKED: next(iter(batch.values()))} for batch in batches]  # nothing is asked for but outputs
    with torch.enable_grad(), differentiated([matrix.tensor for matrix in model.matrices]):
        heard = listen(trainee, asked, Sketch(torch.Generator().manual_seed(seed)))
    return Look(trainee, measure(trainee, batches), heard)


@torch.no_grad()
def answers(trainee: Trainee, batches: Sequence[Batch]) -> Tensor:
    """Log-probabilities of every prediction [N, V]."""
    return torch.cat([log_probabilities(trainee.logits(batch)).flatten(0, -2) for batch in batches])


def compared(s: Tensor, t: Tensor) -> Judged:
    """Mean divergence in nats, and how often the answer is the dense model's, in percent."""
    return Judged(float(divergence(s, t)) / len(s), 100 * float(agreement(s, t)) / len(s))


def bias_of(matrix: Matrix) -> Tensor:
    """The layer's bias, without history. Only where it has one."""
    assert matrix.bias is not None
    return matrix.bias.data


@contextmanager
def biases(matrices: Sequence[Matrix]) -> Iterator[None]:
    """While open, layers that have no bias have one of zeros."""
    bare = {matrix.layer: matrix for matrix in matrices if matrix.bias is None}
    for matrix in bare.values():
        outputs = len(matrix.weight)  # Linear and Conv2d have them first; a Conv1D is never without a bias
        matrix.module.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False)
    try:
        yield
    finally:
        for matrix in bare.values():
            setattr(matrix.module, "bias", None)  # noqa: B010 (mypy knows no module without one)


@contextmanager
def kept(matrices: Sequence[Matrix]) -> Iterator[None]:
    """Afterwards weights and biases are as before."""
    before = [(matrix, matrix.read().clone(), bias_of(matrix).clone()) for matrix in matrices]
    try:
        yield
    finally:
        for matrix, weight, bias in before:
            matrix.write(weight)
            bias_of(matrix).copy_(bias)
