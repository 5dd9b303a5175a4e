"""What pruning a checkpoint by several recipes comes to, before anything is computed: from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from obsprune.core.patterns import Pattern
from obsprune.evaluate.tasks import check_name
from obsprune.models.load import Model, outline
from obsprune.plan import suited, uniform_patterns
from obsprune.recipe import Recipe
from obsprune.studies.base import Cell, Outcome, Table
from obsprune.studies.pruned import Case

FORMS = ("form", "pattern", "matrices", "weights", "zeros", "rounds", "tune, step", "samples a round")


@dataclass(frozen=True)
class Planned:
    """One recipe with a model's defaults, and every matrix's pattern."""

    recipe: Recipe
    model: Model
    patterns: Mapping[str, Pattern]

    @classmethod
    def of(cls, model: Model, recipe: Recipe) -> Planned:
        """Of a model that was opened as the recipe asks. Raises InputError when it cannot be."""
        for task in recipe.evaluation:
            check_name(task)
        recipe = suited(recipe, model.kind)
        return cls(recipe, model, uniform_patterns(recipe, model))

    @property
    def weights(self) -> int:
        """All that some are pruned of."""
        return sum(rows * columns for rows, columns in (matrix.shape for matrix in self.model.matrices))

    @property
    def zeros(self) -> int:
        """Where each matrix meets its pattern by itself."""
        return sum(self.patterns[matrix.name].pruned(*matrix.shape) for matrix in self.model.matrices)

    @property
    def samples(self) -> int:
        """Calibration sequences or images of a round."""
        return self.recipe.data.nsamples or 0  # `suited` has set it

    @property
    def positions(self) -> int:
        """Predictions of one: tokens, of which the model takes so many, or 1 for an image."""
        seqlen = self.recipe.data.seqlen
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or seqlen
        return min(seqlen, longest) if self.model.kind.positional else 1

    def values(self) -> dict[str, float]:
        """By name, for machines."""
        return {
            "blocks": len(self.model.blocks),
            "matrices": len(self.model.matrices),
            "weights": self.weights,
            "zeros": self.zeros,
            "rounds": self.recipe.iters,
            "samples": self.samples,
            "predictions": self.samples * self.positions,
        }

    def row(self, case: Case) -> list[Cell]:
        """As FORMS."""
        part, iters = self.recipe.rounds, self.recipe.iters
        told = (f"{count:,}" for count in (len(self.model.matrices), self.weights, self.zeros))
        moves = f"{part.tune}, {part.step}" if iters > 1 else ""
        each = f"x {self.positions:,}" if self.model.kind.positional else self.model.kind.reads
        return [case.form, str(case.pattern), *told, iters, moves, f"{self.samples:,} {each}"]


def planned(name: str, directory: Path, recipes: Mapping[Case, Recipe]) -> Outcome:
    """All recipes for one checkpoint, of which no weight is read. name: what it is called. Values: bytes;
    FORM.PATTERN.zeros, and so on. Raises InputError.
    """

    @cache
    def opened(blocks: str | None, depthwise: bool, *skip: str) -> Model:
        return outline(str(directory), device="cpu", blocks=blocks, depthwise=depthwise, skip=list(skip))

    plans = {
        case: Planned.of(opened(recipe.model.blocks, recipe.model.depthwise, *recipe.skip), recipe)
        for case, recipe in recipes.items()
    }
    model = next(iter(plans.values())).model
    size = model.checkpoint.bytes
    told: list[Cell] = [name, model.config.model_type, len(model.blocks), f"{size:,}"]
    numbers = {f"{case.name}.{what}": value for case, plan in plans.items() for what, value in plan.values().items()}
    tables = [
        Table("The checkpoint", ("model", "type", "blocks", "bytes"), [told]),
        Table("What is pruned, and on how much", FORMS, [plan.row(case) for case, plan in plans.items()]),
    ]
    return Outcome({"bytes": size, **numbers}, tables)
