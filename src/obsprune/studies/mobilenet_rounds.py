"""The Iterative Optimal Brain Surgeon (Wu et al. 2024) on a pretrained MobileNetV1, beside magnitude, WoodFisher, the
Combinatorial Brain Surgeon and SparseGPT: the same images for all of them, and every method with the statistics of the
batch norms as they were and with new ones (engine/norms.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import torch

from obsprune.core.cbs import Search
from obsprune.core.fisher import Fisher, Layout
from obsprune.engine.curvature import Trainee
from obsprune.engine.fisher import sample_gradients
from obsprune.engine.retrained import labelled, trainee_of
from obsprune.engine.rundir import REPORT
from obsprune.errors import InputError, nearest
from obsprune.models.images import ImageSamples
from obsprune.models.load import Model, load
from obsprune.models.matrices import differentiated
from obsprune.models.samples import Batch
from obsprune.models.shapes import find_shape
from obsprune.pipeline import prune
from obsprune.progress import Progress, Silent
from obsprune.recipe import Recipe, make_recipe
from obsprune.report.report import Report, read_report
from obsprune.studies.base import Outcome, Study
from obsprune.studies.kept import Kept, stamp
from obsprune.studies.material import Material
from obsprune.studies.mobilenet import TOGETHER, Dense, Score, score
from obsprune.studies.mobilenet_compared import NORMS, ROUNDS, Found, figures, tables, values
from obsprune.studies.mobilenet_images import LABELS, copied, two_parts
from obsprune.studies.mobilenet_norms import pruned
from obsprune.studies.planned import planned
from obsprune.studies.pruned import Case
from obsprune.trees import Tree

RANKED = ("magnitude", "woodfisher", "cbs-s", "cbs")
"""Rows of mobilenet.ROWS: all matrices ranked together, by magnitude or by one Fisher matrix."""
ENGINE: dict[str, Tree] = {
    "magnitude-layers": {"solver": {"name": "magnitude"}},
    "sparsegpt": {},
    "iobs": {"rounds": {"tune": "none"}},
    "iobs-tuned": {"rounds": {"tune": "masked"}},
}
"""What `obsprune prune` does beside its defaults; every matrix loses the same share."""


@final
@dataclass(frozen=True)
class MobilenetRounds(Study):
    """model: a folder of the material, or an id on the hub; calibration_from, evaluation_from: a labels file of the
    material or a folder of it with a folder for each class, one for both (two of five images are to calibrate with) or
    two; calibration: images at most, of which `heldout` judge the rounds; evaluation: others; iters, tuned: rounds of
    I-OBS by Newton steps alone, and with masked fine-tuning, the one shot among them; forms: which of the engine's;
    damping, width, candidates, least: of the Fisher matrix and of the search for swaps (mobilenet.py); skip: matrices
    that stay dense; shape: what the model is by its shape (models/shapes.py), for a plan; tiny: a small random model of
    that shape instead, with images of its own.
    Values: METHOD.SPARSITY and .loss.SPARSITY with the norms as they were, METHOD.norms.SPARSITY with new statistics;
    FORM-OTHER.SPARSITY and .stderr.SPARSITY: by how much I-OBS is ahead in top-1, image by image.
    """

    model: str = "mobilenet-v1-050-160"
    calibration_from: str = LABELS
    evaluation_from: str = LABELS
    sparsities: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    calibration: int = 400
    heldout: int = 64
    evaluation: int = 600
    iters: int = 3
    tuned: int = 3
    forms: list[str] = field(default_factory=lambda: list(ENGINE))
    damping: float = 1e-3
    width: int = 64
    candidates: int = 4096
    least: float = 1e-2
    skip: list[str] = field(default_factory=list)
    shape: str = ""
    tiny: bool = False

    def require(self, material: Material) -> None:
        for form in self.forms:
            if form not in ENGINE:
                raise InputError(f"settings.forms names '{form}'; {nearest(form, ENGINE)}")
        if self.seeds > 1:
            raise InputError(f"seeds is {self.seeds}; this study runs once, on images at even distances")
        if not self.tiny:
            self._found(material)

    def plan(self, material: Material) -> Outcome:
        if not self.shape:
            folder = Path(self._checkpoint(material))
            return planned(self.model, folder, self._recipes(folder))
        shape = find_shape(self.shape).reduced if self.tiny else find_shape(self.shape)
        with TemporaryDirectory() as made:
            shape.outline(Path(made))
            return planned(f"{self.shape}, tiny" if self.tiny else shape.id, Path(made), self._recipes(Path(made)))

    def _recipes(self, model: Path) -> dict[Case, Recipe]:
        """What the engine is to do; that all matrices ranked together lose as many weights goes without saying."""
        images = Path("images")
        return {
            Case(form, sparsity): self.recipe(form, sparsity, False, model, images, self.calibration)
            for form in self.forms
            for sparsity in self.sparsities
        }

    def run(self, material: Material, progress: Progress) -> Outcome:
        lasting = replace(material, work=None) if self.tiny else material  # what is made anew cannot be gone on with
        with lasting.working() as folder:
            name, sources = self._made(folder) if self.tiny else self._found(material)
            model = load(name, skip=self.skip)
            calibration, evaluation = two_parts(model, sources, (self.calibration, self.evaluation))
            seen, judged = labelled(calibration, TOGETHER, model.device), labelled(evaluation, TOGETHER, CPU)
            images = copied(calibration, folder / "images")
            recipe = partial(self.recipe, model=model.directory, images=images, count=len(calibration))
            progress.stage("pruning", len(self.sparsities) * len(NORMS) * (len(RANKED) + len(self.forms)))
            kept = Kept(folder, self._about(model, calibration, evaluation))
            ranked = kept.once("ranked", {}, lambda _: self._ranked(model, seen, judged, progress))
            found = {name: {float(s): heard(one) for s, one in by.items()} for name, by in ranked.items()}
            more, rounds = self._engine(recipe, judged, kept, progress)
        found |= more
        return Outcome(
            values(found), tables(found, rounds), figures(found), self._facts(model, calibration, evaluation)
        )

    def _about(self, model: Model, *parts: ImageSamples) -> Tree:
        """All that decides what is found."""
        images = [[part.content_hash(), part.classes] for part in parts]
        return {"settings": asdict(self), "dense": stamp(model.directory), "images": images}

    def _facts(self, model: Model, calibration: ImageSamples, evaluation: ImageSamples) -> dict[str, str]:
        weights = sum(rows * columns for rows, columns in (matrix.shape for matrix in model.matrices))
        labels = "with their labels for WoodFisher and CBS (a gradient for each), without for the others"
        return {
            "calibration": f"{len(calibration)} images, {labels}; {self.heldout} of them judge the rounds of I-OBS",
            "evaluation": f"{len(evaluation)} other images",
            "weights": f"{weights:,} in {len(model.matrices)} matrices",
            "images": evaluation.content_hash(),
        }

    def _found(self, material: Material) -> tuple[str, tuple[Path, Path]]:
        """The checkpoint, and the images of both parts. Raises InputError."""
        sources = [self.calibration_from, self.evaluation_from]
        first, second = (material.require_any(name, "a source of images") for name in sources)
        return self._checkpoint(material), (first, second)

    def _checkpoint(self, material: Material) -> str:
        """As `load` takes it. Raises InputError."""
        config = f"{self.model}/config.json"
        if material.path(config) is None and "/" in self.model:
            return self.model
        return str(material.require(config, "the model").parent)

    def _made(self, folder: Path) -> tuple[str, tuple[Path, Path]]:
        """A tiny checkpoint, and its images."""
        place = folder / "tiny"
        place.mkdir(exist_ok=True)
        source = Path(find_shape(self.shape).tiny(place).removeprefix("imagenet="))
        return str(place), (source, source)

    def _ranked(self, model: Model, seen: list[Batch], judged: list[Batch], progress: Progress) -> Tree:
        """The dense model's score at 0, and those of all matrices ranked together, by name and sparsity."""
        with model.loaded():
            trainee = trainee_of(model, torch.float32, False)
            dense = self._dense(trainee, seen)
            with torch.no_grad():
                found: Tree = {"dense": {0.0: told(score(trainee, judged))}}
                for sparsity in self.sparsities:
                    sparse = dense.pruned(round(sparsity * trainee.size), RANKED)
                    for name, (suffix, new) in product(sparse, NORMS.items()):
                        with pruned(model, trainee, sparse[name], seen if new else []):
                            one = score(trainee, judged)
                        found.setdefault(name + suffix, {})[sparsity] = told(one)
                        progress.step(f"{name}{suffix}, {sparsity:g}: {one.top1:.1f} %")
        return found

    def _dense(self, trainee: Trainee, seen: list[Batch]) -> Dense:
        with differentiated([matrix.tensor for matrix in trainee.matrices]):
            G_NP = sample_gradients(trainee, seen)
        w_P = torch.cat([matrix.read().flatten() for matrix in trainee.matrices])
        sizes = [rows * columns for rows, columns in (matrix.shape for matrix in trainee.matrices)]
        fisher = Fisher.of(G_NP, self.damping, Layout(sizes, self.width))
        return Dense(w_P, fisher, Search(self.candidates, least=self.least))

    def _engine(
        self, recipe: Callable[[str, float, bool], Recipe], judged: list[Batch], kept: Kept, progress: Progress
    ) -> tuple[Found, dict[str, dict[float, list[Report]]]]:
        """Scores, and what is told of the rounds where there are some."""
        found: Found = {}
        rounds: dict[str, dict[float, list[Report]]] = {}
        for form, (suffix, new), sparsity in product(self.forms, NORMS.items(), self.sparsities):
            name = form + suffix
            one, course = carried_out(recipe(form, sparsity, new), f"{name}.{sparsity:g}", judged, kept)
            found.setdefault(name, {})[sparsity] = one
            if form in ROUNDS:
                rounds.setdefault(name, {})[sparsity] = course
            progress.step(f"{name}, {sparsity:g}: {one.top1:.1f} %")
        return found, rounds

    def recipe(self, form: str, sparsity: float, new: bool, model: Path, images: Path, count: int) -> Recipe:
        """What `obsprune prune` is asked for. new: statistics of the batch norms; count: of the images in a folder."""
        iters = {"iobs": self.iters, "iobs-tuned": self.tuned}.get(form, 1)
        heldout = self.heldout if form in ROUNDS else 0
        given = {
            "model": {"name": str(model)},
            "data": {"dataset": f"imagenet={images}", "nsamples": count - heldout, "heldout": heldout},
            "sparsity": sparsity,
            "iters": iters,
            "skip": self.skip,
            "evaluation": ["none"],
            "engine": {"reestimate_norms": new},
        }
        return make_recipe(ENGINE[form], given)


CPU = torch.device("cpu")


def carried_out(recipe: Recipe, name: str, judged: list[Batch], kept: Kept) -> tuple[Score, list[Report]]:
    """The score of a pruned checkpoint, and its rounds; the checkpoint itself does not stay."""

    def work(output: Path) -> Tree:
        report = read_report(output) if (output / REPORT).is_file() else prune(recipe, output, Silent())
        return told(score_of(output, judged)) | {"rounds": report["rounds"]}

    found = kept.once(name, recipe.tree(), work)
    return heard(found), found["rounds"]


def told(score: Score) -> Tree:
    """As plain values."""
    return {"right": score.right_N.tolist(), "losses": score.loss_N.tolist()}


def heard(tree: Tree) -> Score:
    """The score that was told."""
    return Score(torch.tensor(tree["right"]), torch.tensor(tree["losses"]))


@torch.no_grad()
def score_of(checkpoint: Path, judged: list[Batch]) -> Score:
    """Of a checkpoint as anybody would load it."""
    model = load(str(checkpoint))
    with model.loaded():
        return score(trainee_of(model, torch.float32, False), judged)
