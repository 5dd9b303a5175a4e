"""WoodFisher and the Combinatorial Brain Surgeon on a pretrained MobileNetV1, nothing retrained (Singh & Alistarh 2020;
Yu et al. 2022): every selection alone and with the survivors' joint update, all under one Fisher matrix, and SparseGPT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean

import torch
from torch import Tensor

from obsprune.core.cbs import Search
from obsprune.core.fisher import Fisher, Layout, keep_best
from obsprune.engine.curvature import ASKED, Trainee
from obsprune.engine.fisher import sample_gradients
from obsprune.engine.retrained import labelled, trained, trainee_of
from obsprune.engine.training import Layerwise
from obsprune.evaluate.imagenet import judge
from obsprune.models.load import load
from obsprune.models.matrices import differentiated
from obsprune.models.samples import Batch
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Figure, Line
from obsprune.solvers import build
from obsprune.studies.base import Cell, Outcome, Study, Table
from obsprune.studies.material import Material
from obsprune.studies.mobilenet_images import LABELS, two_parts

TOGETHER = 50
"""Images of a batch."""
ROWS: dict[str, tuple[str, str]] = {
    "magnitude": ("magnitude", "none"),
    "magnitude-u": ("magnitude", "joint"),
    "obd": ("obd", "none"),
    "obd-u": ("obd", "joint"),
    "woodfisher-s": ("woodfisher", "none"),
    "woodfisher-published": ("woodfisher", "separate"),
    "woodfisher": ("woodfisher", "joint"),
    "cbs-s": ("cbs", "none"),
    "cbs": ("cbs", "joint"),
}
"""Which selection, and which update of the survivors."""
UPDATES: dict[str, Callable[[Fisher, Tensor, Tensor], Tensor]] = {
    "none": lambda fisher, w_P, keep_P: w_P * keep_P,
    "separate": Fisher.separate_update,
    "joint": Fisher.joint_update,
}


@dataclass(frozen=True, eq=False)
class Dense:
    """The dense model's weights, and their Fisher matrix."""

    w_P: Tensor
    fisher: Fisher
    search: Search

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """What is kept is what has the highest."""
        obd_P = self.w_P.square() * self.fisher.diagonal()
        return {"magnitude": self.w_P.abs(), "obd": obd_P, "woodfisher": self.fisher.saliency(self.w_P)}

    def selections(self, count: int) -> dict[str, Tensor]:
        """The masks without `count` weights, by each method; cbs starts from magnitude's."""
        every_P = torch.ones_like(self.w_P, dtype=torch.bool)
        found = {name: keep_best(score_P, self.w_P, every_P, count) for name, score_P in self.scores.items()}
        return found | {"cbs": self.search.improve(self.fisher, self.w_P, found["magnitude"])}

    def pruned(self, count: int, rows: Iterable[str] = ROWS) -> dict[str, Tensor]:
        """The sparse weights, by row of the table."""
        masks, asked = self.selections(count), {name: ROWS[name] for name in rows}
        return {name: UPDATES[update](self.fisher, self.w_P, masks[which]) for name, (which, update) in asked.items()}


@dataclass(frozen=True, eq=False)
class Score:
    """Of each image: whether the first answer is right, [N] bool, and its cross-entropy in nats, [N]."""

    right_N: Tensor
    loss_N: Tensor

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * float(self.right_N.double().mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(self.loss_N.double().mean())


@dataclass(frozen=True)
class MobilenetSurgery(Study):
    """model: folder of the material. calibration: images for gradients and Grams; evaluation: others, to judge by;
    damping, width: of the Fisher matrix; candidates, least: of the search for swaps; skip: matrices that stay dense.
    """

    model: str = "mobilenet-v1-050-160"
    sparsities: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    calibration: int = 400
    evaluation: int = 600
    damping: float = 1e-3
    width: int = 64
    candidates: int = 4096
    least: float = 1e-2
    skip: list[str] = field(default_factory=list)

    def require(self, material: Material) -> None:
        material.require(f"{self.model}/config.json", "the model")
        material.require(LABELS, "a sample of ImageNet")

    def run(self, material: Material, progress: Progress) -> Outcome:
        model = load(str(material.require(f"{self.model}/config.json", "the model").parent), skip=self.skip)
        source = material.require(LABELS, "a sample of ImageNet")
        calibration, evaluation = two_parts(model, (source, source), (self.calibration, self.evaluation))
        seen, judged = (labelled(part, TOGETHER, model.device) for part in (calibration, evaluation))
        with model.loaded(), differentiated(trained(model)):
            trainee = trainee_of(model, torch.float32, False)
            found = self._scores(trainee, seen, judged, progress)
        facts = {
            "calibration": f"{len(calibration)} images, their labels too: gradients of single images, and Grams",
            "evaluation": f"{len(evaluation)} other images of the sample",
            "weights": f"{trainee.size:,} in {len(trainee.matrices)} pointwise convolutions; nothing is retrained",
            "images": evaluation.content_hash(),
        }
        return Outcome(values(found), [tables(found, "top1"), tables(found, "loss")], [figure(found)], facts)

    def _scores(
        self, trainee: Trainee, seen: list[Batch], judged: list[Batch], progress: Progress
    ) -> dict[str, dict[float, Score]]:
        """By row and sparsity; the dense model's at 0."""
        sizes = [rows * columns for rows, columns in (matrix.shape for matrix in trainee.matrices)]
        G_NP = sample_gradients(trainee, seen)
        with torch.no_grad():
            w_P = torch.cat([matrix.turn(matrix.weight).flatten() for matrix in trainee.matrices])
            fisher = Fisher.of(G_NP, self.damping, Layout(sizes, self.width))
            dense = Dense(w_P, fisher, Search(self.candidates, least=self.least))
            found: dict[str, dict[float, Score]] = {"dense": {0.0: score(trainee, judged)}}
            progress.stage("pruning", len(self.sparsities))
            for sparsity in self.sparsities:
                for name, weights_P in dense.pruned(round(sparsity * len(w_P))).items():
                    write(trainee, weights_P)
                    found.setdefault(name, {})[sparsity] = score(trainee, judged)
                write(trainee, w_P)
                Layerwise(build("sparsegpt", {})).prune(trainee, {}, sparsity, seen)
                found.setdefault("sparsegpt", {})[sparsity] = score(trainee, judged)
                progress.step()
        return found


def write(trainee: Trainee, w_P: Tensor) -> None:
    """Puts the weights of all matrices into the model."""
    sizes = [rows * columns for rows, columns in (matrix.shape for matrix in trainee.matrices)]
    for matrix, part in zip(trainee.matrices, torch.split(w_P, sizes), strict=True):
        matrix.write(part.view(matrix.shape))


def score(trainee: Trainee, batches: list[Batch]) -> Score:
    """Of the model as it is, on these images."""
    device = trainee.matrices[0].device
    moved = ({name: x.to(device) for name, x in batch.items()} for batch in batches)
    pairs = [judge(trainee.logits(batch), batch[ASKED]) for batch in moved]
    ranks, losses = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return Score((ranks == 0).cpu(), losses.cpu())


def values(found: Mapping[str, Mapping[float, Score]]) -> dict[str, float]:
    """NAME.SPARSITY: top-1; NAME.loss.SPARSITY; NAME.mean: top-1 over all sparsities."""
    pruned = {name: by for name, by in found.items() if name != "dense"}
    top1 = {f"{name}.{s:g}": one.top1 for name, by in pruned.items() for s, one in by.items()}
    loss = {f"{name}.loss.{s:g}": one.loss for name, by in pruned.items() for s, one in by.items()}
    means = {f"{name}.mean": mean(one.top1 for one in by.values()) for name, by in pruned.items()}
    return {"dense": found["dense"][0.0].top1, **top1, **loss, **means}


def tables(found: Mapping[str, Mapping[float, Score]], what: str) -> Table:
    """All rows over all sparsities."""
    pruned = {name: by for name, by in found.items() if name != "dense"}
    sparsities = list(next(iter(pruned.values())))
    title = {"top1": "Top-1 accuracy in percent", "loss": "Cross-entropy in nats"}[what]
    rows: list[list[Cell]] = [[name, *(getattr(by[s], what) for s in sparsities)] for name, by in pruned.items()]
    title += f", dense {getattr(found['dense'][0.0], what):.4g}"
    return Table(title, ["method", *(f"{100 * s:g} %" for s in sparsities)], rows)


def figure(found: Mapping[str, Mapping[float, Score]]) -> Figure:
    """Accuracy over sparsity."""
    shown = ("magnitude", "obd", "woodfisher-published", "woodfisher", "cbs-s", "cbs", "sparsegpt")
    lines = {name: Line([100 * s for s in found[name]], [one.top1 for one in found[name].values()]) for name in shown}
    return Figure("accuracy", [Curves("MobileNetV1 0.5/160, nothing retrained", "sparsity, %", "top-1, %", lines)])
