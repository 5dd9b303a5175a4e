"""Real layers, one by one: what each method makes of the layer problem min tr (W−Z) H (W−Z)ᵀ at every sparsity, on the
inputs it was given and on others, and how long it takes. All layers are those of the dense model; none is put back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import final

from torch import Tensor

from obsprune.core.linalg import layer_loss
from obsprune.core.statistics import Gram
from obsprune.engine.curvature import Trainee
from obsprune.engine.training import measure
from obsprune.errors import InputError, nearest
from obsprune.models.data import Draw, draw
from obsprune.models.kinds import Wish
from obsprune.models.load import Model, load
from obsprune.models.matrices import Matrix
from obsprune.progress import Progress
from obsprune.recipe import parse_n_of_m
from obsprune.report.figures import RIGHT, Curves, Figure, Line
from obsprune.studies.base import Cell, Outcome, Study, Table
from obsprune.studies.elimination.models import DATA
from obsprune.studies.layer_methods import METHODS, Answer
from obsprune.studies.material import Material

RIVAL = "sparsegpt"
"""What all are compared with."""


@dataclass(frozen=True)
class Layer:
    """Rows of a matrix [R, C], and the Grams of its inputs: those that the methods see, and others."""

    name: str
    weight: Tensor
    gram: Gram
    judge: Gram


@dataclass(frozen=True)
class Score:
    """error: the share of the output's energy that is lost on the inputs that were seen; heldout: on the others."""

    error: float
    heldout: float
    seconds: float


def share_lost(W_RC: Tensor, Z_RC: Tensor, H_CC: Tensor) -> float:
    """tr (W−Z) H (W−Z)ᵀ / tr W H Wᵀ."""
    return layer_loss(W_RC - Z_RC, H_CC) / layer_loss(W_RC, H_CC)


def score(layer: Layer, answer: Answer) -> Score:
    """What an answer is worth."""
    error, heldout = (share_lost(layer.weight, answer.weight, gram.H_CC) for gram in (layer.gram, layer.judge))
    return Score(error, heldout, answer.seconds)


@final
@dataclass
class Comparison:
    """scores: {method: {level: [layer]}}; shares: {level: sparsity}, for those levels that are on a curve."""

    layers: Sequence[str]
    shares: Mapping[str, float]
    scores: dict[str, dict[str, list[Score]]] = field(default_factory=dict)

    def add(self, method: str, level: str, one: Score) -> None:
        """The next layer's."""
        self.scores.setdefault(method, {}).setdefault(level, []).append(one)

    def over_rival(self, method: str, level: str) -> list[float]:
        """A method's error over SparseGPT's, layer by layer."""
        pairs = zip(self.scores[method][level], self.scores[RIVAL][level], strict=True)
        return [one.error / other.error for one, other in pairs]

    def error(self, method: str, level: str) -> float:
        """Mean over the layers, as the two below."""
        return mean(one.error for one in self.scores[method][level])

    def heldout(self, method: str, level: str) -> float:
        return mean(one.heldout for one in self.scores[method][level])

    def seconds(self, method: str, level: str) -> float:
        return mean(one.seconds for one in self.scores[method][level])

    def values(self) -> dict[str, float]:
        """As `Layers` names them."""
        found = {}
        for method, levels in self.scores.items():
            for level in levels:
                found[f"{method}.{level}"] = self.error(method, level)
                found[f"{method}.heldout.{level}"] = self.heldout(method, level)
                over = self.over_rival(method, level)
                for part, value in (("", mean(over)), (".least", min(over)), (".most", max(over))):
                    found[f"{method}.ratio{part}.{level}"] = value
            found[f"{method}.seconds"] = mean(self.seconds(method, level) for level in self.shares)
        return found

    def tables(self, mark: str) -> list[Table]:
        """Means at every level, and the layers one by one at `mark`."""
        over = f"Error over SparseGPT's on the same layer at {mark}"
        columns = [self.over_rival(method, mark) for method in self.scores if mark in self.scores[method]]
        rows: list[list[Cell]] = [[name, *row] for name, *row in zip(self.layers, *columns, strict=True)]
        return [
            self._table("Share of the output's energy that is lost on the inputs that were seen", self.error),
            self._table("The same on other inputs", self.heldout),
            self._table("Error over SparseGPT's on the same layer: mean (least to most)", self._ranged),
            self._table("Seconds of one processor for one layer", self.seconds),
            Table(over, ["layer", *(method for method in self.scores if mark in self.scores[method])], rows),
        ]

    def figure(self) -> Figure:
        """Errors, errors over SparseGPT's, and times over the sparsities."""
        *others, last = [
            self._curves("lost on the inputs that were seen", "share of the energy", self.error),
            self._curves("error over SparseGPT's", "ratio, mean of layers", self._ratio, log_y=False),
            self._curves("time for one layer", "processor seconds", self.seconds),
        ]
        return Figure("layers", [*(replace(panel, legend=None) for panel in others), replace(last, legend=RIGHT)])

    def _ratio(self, method: str, level: str) -> float:
        return mean(self.over_rival(method, level))

    def _ranged(self, method: str, level: str) -> str:
        over = self.over_rival(method, level)
        return f"{mean(over):.3f} ({min(over):.2f} to {max(over):.2f})"

    def _table(self, title: str, cell: Callable[[str, str], Cell]) -> Table:
        levels = list(self.scores[RIVAL])
        rows: list[list[Cell]] = [
            [method, *(cell(method, level) if level in known else "–" for level in levels)]
            for method, known in self.scores.items()
        ]
        return Table(title, ["method", *levels], rows)

    def _curves(self, title: str, y: str, number: Callable[[str, str], float], log_y: bool = True) -> Curves:
        lines = {
            method: Line(list(self.shares.values()), [number(method, level) for level in self.shares])
            for method in self.scores
        }
        return Curves(title, "sparsity", y, lines, log_y=log_y)


@final
@dataclass(frozen=True)
class Layers(Study):
    """model: folder of the material; layers: expressions, of which a matrix's name has one in it; weights: at most so
    many of each matrix are looked at, in whole rows at even distances (rows are problems of their own but for their
    common budget); sparsities, groups (n:m): the levels; calibration, judged: images, or sequences of `seqlen` tokens;
    batch: of one pass; mark: the level at which the layers are shown one by one.

    Values, means over the layers: METHOD.LEVEL, METHOD.heldout.LEVEL; METHOD.ratio.LEVEL, the error over SparseGPT's on
    the same layer, with .ratio.least and .ratio.most; METHOD.seconds, over all sparsities, too.
    """

    model: str = "stories260k"
    layers: list[str] = field(default_factory=lambda: [r"layers\.(0|2|4)\..*(q|o|gate|down)_proj"])
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    sparsities: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    groups: list[str] = field(default_factory=lambda: ["2:4"])
    weights: int = 16384
    calibration: int = 128
    judged: int = 128
    seqlen: int = 256
    batch: int = 16
    mark: str = "0.5"

    def require(self, material: Material) -> None:
        material.require(f"{self.model}/config.json", f"the model {self.model}")

    def run(self, material: Material, progress: Progress) -> Outcome:
        for name in self.methods:
            if name not in METHODS:
                raise InputError(f"settings.methods names '{name}'; {nearest(name, METHODS)}")
        layers, facts = self._measured(material)
        found = Comparison([layer.name for layer in layers], {f"{share:g}": share for share in self.sparsities})
        progress.stage("layers", len(layers) * len(self.methods))
        for layer in layers:
            for name in self.methods:
                for level, answer in self._answers(name, layer):
                    found.add(name, level, score(layer, answer))
                progress.step(f"{layer.name}, {name}")
        return Outcome(found.values(), found.tables(self.mark), [found.figure()], facts)

    def _measured(self, material: Material) -> tuple[list[Layer], dict[str, str]]:
        model = load(str(material.require(f"{self.model}/config.json", self.model).parent), device="cpu")
        matrices = [m for m in model.matrices if any(re.search(one, m.name) for one in self.layers)]
        if not matrices:
            raise InputError(f"settings.layers: no matrix of {self.model} is called {' or '.join(self.layers)}")
        drawn, trainee = (
            self._drawn(model, material),
            Trainee(model.network, matrices, lambda b: model.network(**b).logits),
        )
        with model.loaded():
            gram, judge = (
                measure(trainee, model.batches(part, self.batch)) for part in (drawn.calibration, drawn.heldout)
            )
            layers = [Layer(m.name, self._rows(m), gram[m.name], judge[m.name]) for m in matrices]
        facts = {
            "seen": f"{len(drawn.calibration)} {drawn.calibration.noun}, {layers[0].gram.count:,} tokens",
            "others": f"{len(drawn.heldout)} {drawn.heldout.noun} of the same source",
            "hashes": f"{drawn.calibration.content_hash()} {drawn.heldout.content_hash()}",
            "layers": ", ".join(f"{one.name} {tuple(one.weight.shape)}" for one in layers),
        }
        return layers, facts

    def _drawn(self, model: Model, material: Material) -> Draw:
        path = material.require(DATA[model.kind.reads], f"what {model.kind.reads} are calibrated with")
        dataset = f"imagenet={path}" if model.kind.reads == "images" else str(path)
        return draw(model.open(Wish(dataset, self.seqlen, None))[0], self.calibration, self.judged, seed=0)

    def _rows(self, matrix: Matrix) -> Tensor:
        rows, columns = matrix.shape
        some = max(1, min(rows, self.weights // columns))
        return matrix.read()[[place * rows // some for place in range(some)]]

    def _answers(self, name: str, layer: Layer) -> Iterator[tuple[str, Answer]]:
        """Level by level."""
        method = METHODS[name]
        shares = [method.share(sparsity) for sparsity in self.sparsities]
        levels = [f"{sparsity:g}" for sparsity in self.sparsities]
        yield from zip(levels, method.answers(layer.weight, layer.gram, shares), strict=True)
        for group in self.groups if method.grouped else ():
            yield from zip([group], method.answers(layer.weight, layer.gram, [parse_n_of_m(group)]), strict=True)
