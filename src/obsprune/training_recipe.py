"""What was asked of `train-prune`: one frozen tree of plain values, written out into every run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from obsprune.core.cbs import CombinatorialSurgeon
from obsprune.core.fisher import Surgeon, WoodFisher
from obsprune.core.saliency import FirstOrder, Magnitude, OptimalBrainDamage, Taylor
from obsprune.engine.curvature import CURVATURES, Curvature
from obsprune.engine.fisher import Surgery
from obsprune.engine.retrained import Course
from obsprune.engine.training import Criterion, Layerwise, Ranked, evenly
from obsprune.errors import InputError, nearest
from obsprune.recipe import Recipe, make_recipe
from obsprune.recipe_parts import ModelPart
from obsprune.solvers import SOLVERS, build
from obsprune.trees import Tree, merge, read_recipe, typed


@dataclass(frozen=True)
class Method:
    """Which weights go, by a name. make: given the curvature; curvature: where none is named, `none` where none is
    looked at; sees: whether data are.
    """

    make: Callable[[Curvature], Criterion]
    curvature: str = "none"
    sees: bool = True


def _layerwise(name: str, curvature: Curvature) -> Criterion:
    return Layerwise(build(name, {}))


def _surgery(surgeon: Surgeon, curvature: Curvature) -> Criterion:
    return Surgery(surgeon)


METHODS: dict[str, Method] = {
    "magnitude": Method(partial(Ranked, Magnitude()), sees=False),
    "first-order": Method(partial(Ranked, FirstOrder())),
    "taylor": Method(partial(Ranked, Taylor()), "batch"),
    "obd": Method(partial(Ranked, OptimalBrainDamage()), "sample"),
    "woodfisher": Method(partial(_surgery, WoodFisher())),
    "cbs": Method(partial(_surgery, CombinatorialSurgeon())),
    **{name: Method(partial(_layerwise, name)) for name in SOLVERS if name != "magnitude"},
}
"""Scores and surgeons rank all matrices together; a layer solver (`obsprune prune --solver`) prunes each alike."""
KNOWN_CURVATURES = [name for name in CURVATURES if name != "none"]
COMPUTE = {"auto": "float32", "float32": "float32", "bfloat16": "bfloat16"}
"""Of the forward passes. Masters are float32 in any case; gradients would underflow in float16."""
NORMS = ("frozen", "moving")
HELDOUT = 64


@dataclass(frozen=True)
class ImagesPart:
    """Labelled images. nsamples: those that scores are measured on; heldout: kept apart from training and scores for
    `--eval heldout`; without a number 64 if that is evaluated, else none.
    """

    dataset: str | None = None
    nsamples: int = 256
    heldout: int | None = None


@dataclass(frozen=True)
class TrainingPart:
    """How often is pruned, and what follows each time. curvature: without a name what suits the method; epochs: of each
    step; lr: of Adam at the beginning of each step, from where it falls to 0 along a cosine; norms: `frozen` keeps the
    statistics of batch norms, `moving` gathers new ones.
    """

    method: str = "sparsegpt"
    curvature: str | None = None
    steps: int = 10
    epochs: int = 1
    lr: float = 1e-4
    batch_size: int = 32
    norms: str = "frozen"


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything that decides the result."""

    model: ModelPart = field(default_factory=ModelPart)
    data: ImagesPart = ImagesPart()
    training: TrainingPart = TrainingPart()
    sparsity: float | None = None
    skip: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)
    device: str = "auto"
    seed: int = 0

    def tree(self) -> Tree:
        """As nested plain values, for YAML and JSON."""
        return dataclasses.asdict(self)

    @cached_property
    def like(self) -> Recipe:
        """What both commands ask alike, as `prune` asks it: to open the model, draw the images and evaluate."""
        model = dataclasses.asdict(self.model) | {"dtype": "float32"}
        common = {"sparsity": self.sparsity, "skip": self.skip, "evaluation": self.evaluation, "seed": self.seed}
        data = dataclasses.asdict(self.data)
        return make_recipe({"model": model, "data": data, "engine": {"device": self.device}, **common})

    @property
    def method(self) -> Method:
        return METHODS[self.training.method]

    @property
    def compute(self) -> str:
        """The dtype of the forward passes."""
        return COMPUTE[self.model.dtype]

    def make_course(self) -> Course:
        """The course of pruning and retraining."""
        part = self.training
        assert self.sparsity is not None
        assert part.curvature is not None  # `make_training` has set both
        criterion = self.method.make(CURVATURES[part.curvature])
        sparsities, moving = evenly(self.sparsity, part.steps), part.norms == "moving"
        return Course(criterion, sparsities, part.epochs, part.lr, part.batch_size, moving, self.seed)

    @property
    def label(self) -> str:
        """What is done, in a file name: sparsegpt-70-steps10."""
        assert self.sparsity is not None
        part = self.training
        return f"{part.method}-{100 * self.sparsity:.4g}-steps{part.steps}"


def make_training(*trees: Mapping[str, Any]) -> TrainingRecipe:
    """One recipe from trees of growing priority, checked and with every default written out. Raises InputError."""
    asked: TrainingRecipe = typed(TrainingRecipe, _merged(trees), "")
    if asked.model.dtype not in COMPUTE:
        raise InputError(f"--dtype {asked.model.dtype} is not for training; {nearest(asked.model.dtype, COMPUTE)}")
    evaluated = not asked.evaluation or "heldout" in asked.evaluation
    heldout = asked.data.heldout if asked.data.heldout is not None else HELDOUT if evaluated else 0
    data = dataclasses.replace(asked.data, heldout=heldout)
    recipe = dataclasses.replace(asked, data=data, training=_resolved(asked.training))
    return dataclasses.replace(recipe, sparsity=recipe.like.sparsity)  # which has checked all that is alike


def _merged(trees: Iterable[Mapping[str, Any]]) -> Tree:
    """As `merge`; another method drops the curvature of the one before."""
    result: Tree = {}
    for tree in trees:
        before, part = result.get("training", {}), tree.get("training")
        if isinstance(part, Mapping) and part.get("method", before.get("method")) != before.get("method"):
            result["training"] = {key: value for key, value in before.items() if key != "curvature"}
        result = merge(result, tree)
    return result


def _resolved(part: TrainingPart) -> TrainingPart:
    """With the curvature that suits the method. Raises InputError for what cannot be."""
    if part.method not in METHODS:
        raise InputError(f"unknown method '{part.method}'; {nearest(part.method, METHODS)}")
    for name, value, least in (
        ("--steps", part.steps, 1),
        ("--epochs", part.epochs, 0),
        ("--batch-size", part.batch_size, 1),
    ):
        if value < least:
            raise InputError(f"{name} {value}: a number from {least} up is expected")
    if part.norms not in NORMS:
        raise InputError(f"training.norms is '{part.norms}'; {nearest(part.norms, NORMS)}")
    if not 0 < part.lr <= 1:
        raise InputError(f"--lr {part.lr:g}: a positive number, 1 at most, is expected")
    own = METHODS[part.method].curvature
    if part.curvature is None:
        return dataclasses.replace(part, curvature=own)
    if own == "none" and part.curvature != "none":
        raise InputError(f"--curvature {part.curvature}: {part.method} looks at none; drop it")
    if own != "none" and part.curvature not in KNOWN_CURVATURES:
        raise InputError(f"unknown curvature '{part.curvature}'; {nearest(part.curvature, KNOWN_CURVATURES)}")
    return part


def recorded(path: Path) -> Recipe:
    """What a run was asked, from its recipe.yaml, by whichever command; of `train-prune` what it has in common with
    `prune`. Raises InputError.
    """
    tree = read_recipe(path)
    return make_training(tree).like if "training" in tree else make_recipe(tree)
