"""A pretrained checkpoint pruned by whole recipes, as `obsprune prune` does it, with the scores of every round: the
tables and figures of the papers that prune checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

from obsprune.engine.rundir import REPORT
from obsprune.models.checkpoint import write_text
from obsprune.models.load import locate
from obsprune.models.shapes import find_shape
from obsprune.pipeline import prune
from obsprune.progress import Progress
from obsprune.recipe import Recipe, make_recipe
from obsprune.report.report import Report, read_report
from obsprune.studies.base import Outcome, Study
from obsprune.studies.kept import Kept, stamp, stamp_named
from obsprune.studies.material import Material
from obsprune.studies.planned import planned
from obsprune.studies.pruned import Case, facts, figures, tables, values
from obsprune.trees import Tree

HERE = "{data}"
"""Stands for the material's folder in the name of a data set or a task."""
FIFTHS = 2
"""Of every five images of a divided labels file, those that calibrate and judge; the others are evaluated."""


@dataclass(frozen=True)
class Subject:
    """What is pruned and on what, as the command line takes it."""

    model: str
    dataset: str
    evaluation: list[str]

    def within(self, material: Material) -> Subject:
        """With the material's folder for `{data}`, and for a model that lies there. Raises InputError when a file is
        not there.
        """
        for name in (self.dataset, *self.evaluation):
            if HERE in name:
                material.require_any(name.partition(f"{HERE}/")[2], "what is calibrated or evaluated on")
        config = material.path(f"{self.model}/config.json")
        if config is None and "/" not in self.model:
            material.require(f"{self.model}/config.json", "the model")
        return Subject(
            str(config.parent) if config else self.model,
            self.dataset.replace(HERE, str(material.folder)),
            [name.replace(HERE, str(material.folder)) for name in self.evaluation],
        )

    def stamps(self) -> dict[str, str]:
        """Of the data, where it lies on this machine: a data set of the hub has none."""
        return {name: stamp_named(name) for name in (self.dataset, *self.evaluation)}

    def divided(self, folder: Path) -> Subject:
        """A labels file (imagenet=PATH) cut in two, written into `folder`."""
        source = Path(self.dataset.partition("=")[2]).resolve()
        rows = source.read_text(encoding="utf-8").splitlines()
        parts = {
            "calibration": [row for place, row in enumerate(rows) if place % 5 < FIFTHS],
            "evaluation": [row for place, row in enumerate(rows) if place % 5 >= FIFTHS],
        }
        named = {}
        for part, own in parts.items():
            path = folder / f"{part}{source.suffix}"
            write_text(path, "".join(f"{source.parent}/{row}\n" for row in own))
            named[part] = f"imagenet={path}"
        return Subject(self.model, named["calibration"], [named["evaluation"]])


@final
@dataclass(frozen=True)
class Pruning(Study):
    """model: a checkpoint's folder in the material, or an id on the hub; dataset, evaluation: as of `prune`, `{data}`
    being the material's folder; split: of every five images of the data set, a labels file, two calibrate and judge,
    the others are evaluated; common: a recipe's tree for all forms; forms: what each changes of it; patterns:
    sparsities, or n:m; shape: what the model is by its shape (models/shapes.py), for a plan; tiny: a small random model
    of that shape instead, with samples of its own.
    Values: dense.TASK; FORM.PATTERN.TASK, of the result; .TASK.roundN and .kl.roundN where rounds are scored; .round,
    the best one; .sparsity; .seconds of the work on blocks and of rounds, before a stop and after it, every evaluation
    left out: means over the seeds.
    """

    model: str = "stories260k"
    dataset: str = ""
    evaluation: list[str] = field(default_factory=list)
    split: bool = False
    common: Tree = field(default_factory=dict)
    forms: Tree = field(default_factory=lambda: {"sparsegpt": {"solver": {"name": "sparsegpt"}}})
    patterns: list[float | str] = field(default_factory=lambda: [0.5])
    shape: str = ""
    tiny: bool = False

    @property
    def cases(self) -> list[Case]:
        return [Case(form, pattern) for form in self.forms for pattern in self.patterns]

    @property
    def subject(self) -> Subject:
        """As the recipe names it."""
        return Subject(self.model, self.dataset, self.evaluation)

    def require(self, material: Material) -> None:
        for case in self.cases:
            self.recipe(case, 0, self.subject)  # or InputError
        if not self.tiny:
            self.subject.within(material)

    def plan(self, material: Material) -> Outcome:
        """Of a model in the material by its own headers, of one on the hub by its shape."""
        recipes = {case: self.recipe(case, 0, self.subject) for case in self.cases}
        lies_here = "/" not in self.model or material.path(f"{self.model}/config.json")
        if lies_here and not self.tiny:
            config = material.require(f"{self.model}/config.json", "the model")
            return planned(self.model, config.parent, recipes)
        true = find_shape(self.shape)
        with TemporaryDirectory() as folder:
            (true.reduced if self.tiny else true).outline(Path(folder))
            return planned(f"{self.shape}, tiny" if self.tiny else true.id, Path(folder), recipes)

    def run(self, material: Material, progress: Progress) -> Outcome:
        lasting = replace(material, work=None) if self.tiny else material  # what is made anew cannot be gone on with
        with lasting.working() as folder:
            whole = self._made(folder) if self.tiny else self.subject.within(material)
            subject = whole.divided(folder) if self.split and not self.tiny else whole
            kept = Kept(folder, whole.stamps())
            found = {
                case: [self._pruned(case, seed, subject, kept, progress) for seed in range(self.seeds)]
                for case in self.cases
            }
        told = _without(facts(next(iter(found.values()))[0]), {str(folder): "", str(material.folder): HERE})
        return Outcome(values(found), tables(found), figures(self.model, found), told)

    def recipe(self, case: Case, seed: int, subject: Subject) -> Recipe:
        """What `obsprune prune` is asked for. Raises InputError."""
        sparse = {"pattern": case.pattern} if isinstance(case.pattern, str) else {"sparsity": case.pattern}
        given = {"model": {"name": subject.model}, "data": {"dataset": subject.dataset}, "seed": seed, **sparse}
        return make_recipe({"evaluation": subject.evaluation}, self.common, self.forms[case.form], given)

    def _made(self, folder: Path) -> Subject:
        """A tiny checkpoint, and its samples."""
        place = folder / "tiny"
        place.mkdir(exist_ok=True)
        return Subject(str(place), find_shape(self.shape).tiny(place), ["heldout"])

    def _pruned(self, case: Case, seed: int, subject: Subject, kept: Kept, progress: Progress) -> Report:
        """The report of one run. Its weights do not stay."""
        recipe, name = self.recipe(case, seed, subject), f"{case.name}-{seed}"
        dense = locate(recipe.model.name, recipe.model.revision)

        def work(output: Path) -> Report:
            progress.line(f"{case.name}, seed {seed}")
            return read_report(output) if (output / REPORT).is_file() else prune(recipe, output, progress)

        return kept.once(name, {"recipe": recipe.tree(), "dense": stamp(dense)}, work)


def _without(told: Mapping[str, str], places: Mapping[str, str]) -> dict[str, str]:
    """The facts, whatever folders this machine has: {folder: what is said instead}."""
    for place, instead in places.items():
        told = {name.replace(place, instead): fact.replace(place, instead) for name, fact in told.items()}
    return dict(told)
