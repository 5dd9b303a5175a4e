"""What was asked of `finetune`: one frozen tree of plain values, written out into every run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from obsprune import training_recipe
from obsprune.engine.distillation import Course
from obsprune.errors import InputError, nearest
from obsprune.recipe import Recipe, make_recipe
from obsprune.recipe_parts import DataPart, ModelPart
from obsprune.trees import Tree, merge, read_recipe, typed

COMPUTE = ("auto", "float32", "bfloat16")
"""Of the forward passes. The weights that are trained are float32 in any case."""
WIDTH, RATE = 64, 2e-3
"""A rate that suits a width; others get it in inverse proportion (Yang et al. 2021, table 3: Adam, hidden weights)."""


@dataclass(frozen=True)
class TuningPart:
    """How the weights are tuned. teacher: the dense model, none for the next token alone; batch_size: samples of a
    step, of all processes together; at_once: of one forward in each process, or `auto`; lr: of AdamW at its highest,
    without a number what suits the model's width; warmup: the share of the steps in which the rate rises, after which
    it falls to 0 along a cosine; distill: the divergence's share of the loss, the model's own loss has the rest (1 with
    a teacher, 0 without); temperature: of the divergence; decay, clip: weight decay, and the longest gradient; every:
    steps between two looks at what is held out, a tenth of all without a number; checkpointing: activations are
    computed twice instead of kept.
    """

    teacher: str | None = None
    steps: int = 300
    batch_size: int = 16
    at_once: int | str = "auto"
    lr: float | None = None
    warmup: float = 0.05
    distill: float | None = None
    temperature: float = 1.0
    decay: float = 0.0
    clip: float = 1.0
    every: int | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything that decides the result."""

    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    tuning: TuningPart = field(default_factory=TuningPart)
    evaluation: list[str] = field(default_factory=list)
    device: str = "auto"
    seed: int = 0

    def tree(self) -> Tree:
        """As nested plain values, for YAML and JSON."""
        return dataclasses.asdict(self)

    @cached_property
    def like(self) -> Recipe:
        """What both commands ask alike, as `prune` asks it: to open the model, draw the samples and evaluate."""
        parts = {"model": dataclasses.asdict(self.model), "data": dataclasses.asdict(self.data)}
        return make_recipe(parts, {"evaluation": self.evaluation, "seed": self.seed, "engine": {"device": self.device}})

    def make_course(self) -> Course:
        """The course of the steps."""
        part = self.tuning
        assert part.lr is not None
        assert part.distill is not None
        assert part.every is not None  # `make_finetuning` and the plan have set all of them
        return Course(
            part.steps, part.batch_size, part.at_once, part.lr, part.warmup, part.distill, part.temperature, part.decay,
            part.clip, part.every, self.seed,
        )  # fmt: skip

    @property
    def label(self) -> str:
        """What is done, in a file name: distilled-300."""
        return f"{'distilled' if self.tuning.teacher else 'finetuned'}-{self.tuning.steps}"


def make_finetuning(*trees: Mapping[str, Any]) -> FinetuneRecipe:
    """One recipe from trees of growing priority, checked; what depends on the model is open. Raises InputError."""
    recipe: FinetuneRecipe = typed(FinetuneRecipe, merge(*trees), "")
    if recipe.model.dtype not in COMPUTE:
        raise InputError(f"--dtype {recipe.model.dtype} is not for training; {nearest(recipe.model.dtype, COMPUTE)}")
    _ = recipe.like  # which checks all that is alike
    return dataclasses.replace(recipe, tuning=_resolved(recipe.tuning))


def _resolved(part: TuningPart) -> TuningPart:
    """With the shares that suit whether there is a teacher. Raises InputError for what cannot be."""
    _check(part)
    if not part.teacher and part.distill:
        raise InputError(f"--distill {part.distill:g} needs the dense model: --teacher DENSE")
    if part.teacher and part.distill == 0:
        raise InputError(f"--distill 0 asks nothing of --teacher {part.teacher}; drop one of them")
    distill = part.distill if part.distill is not None else 1.0 if part.teacher else 0.0
    return dataclasses.replace(part, distill=distill, every=part.every or max(1, part.steps // 10))


def _check(part: TuningPart) -> None:
    """Raises InputError for a number that is out of its bounds."""
    for name, number in (
        ("--steps", part.steps),
        ("--batch-size", part.batch_size),
        ("--checkpoint-every", 1 if part.every is None else part.every),
        ("tuning.at_once", 1 if part.at_once == "auto" else part.at_once),
    ):
        if not isinstance(number, int) or number < 1:
            raise InputError(f"{name} {number}: a number from 1 up is expected")
    for name, value, least, most in (
        ("--lr", RATE if part.lr is None else part.lr, 1e-12, 1.0),
        ("--warmup", part.warmup, 0.0, 1.0),
        ("--distill", part.distill or 0.0, 0.0, 1.0),
        ("--temperature", part.temperature, 0.01, 100.0),
        ("tuning.decay", part.decay, 0.0, 1.0),
        ("tuning.clip", part.clip, 1e-12, math.inf),
    ):
        if not least <= value <= most:
            raise InputError(f"{name} {value:g}: a number from {least:g} to {most:g} is expected")


def suitable_rate(config: Any) -> float:
    """The learning rate for a model of this config's width. Raises InputError where it has none."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise InputError(f"a {config.model_type} model has no one width that tells a learning rate; give --lr")
    return float(f"{RATE * WIDTH / width:.2g}")


def recorded(path: Path) -> Recipe:
    """What a run was asked, from its recipe.yaml, by whichever command: what it has in common with `prune`. Raises
    InputError.
    """
    tree = read_recipe(path)
    return make_finetuning(tree).like if "tuning" in tree else training_recipe.recorded(path)
