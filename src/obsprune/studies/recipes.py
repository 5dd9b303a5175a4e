"""The recipes of papers: recipes/PAPER/NAME.yaml names a study, its settings, and the values that are expected."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from obsprune import __version__
from obsprune.errors import InputError, OutputError, first_line, nearest
from obsprune.models.checkpoint import write_text
from obsprune.progress import Progress
from obsprune.report.figures import require_matplotlib, save
from obsprune.studies import find_study
from obsprune.studies.base import Cell, Outcome, Study, Table
from obsprune.studies.material import Material
from obsprune.trees import Tree, merge, read_recipe, typed

RESULTS, TABLES = "results.json", "results.md"


@dataclass(frozen=True)
class Expected:
    """What a value should be: `value` within `tolerance`, or a bound. source: who says so; smoke: it holds for a smoke
    run too.
    """

    source: str
    value: float | None = None
    tolerance: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    smoke: bool = False

    def check(self, name: str) -> None:
        """Raises InputError unless it says one thing, and all of it."""
        near = self.value is not None and self.tolerance is not None and self.tolerance > 0
        if [near, self.at_most is not None, self.at_least is not None].count(True) != 1:
            raise InputError(f"expected.{name}: give value and a tolerance above 0, or at_most, or at_least")

    def met(self, found: float) -> bool:
        """Whether the value is as it should be."""
        if self.value is not None:
            return abs(found - self.value) <= (self.tolerance or 0.0)
        if self.at_most is not None:
            return found <= self.at_most
        return found >= (self.at_least or 0.0)

    def __str__(self) -> str:
        if self.value is not None:
            return f"{self.value:g} ± {self.tolerance:g}"
        return f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"


@dataclass(frozen=True)
class PaperRecipe:
    """One YAML file. settings: of the study; smoke: what a smoke run changes of them."""

    study: str
    settings: Tree = field(default_factory=dict)
    smoke: Tree = field(default_factory=dict)
    expected: Tree = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> PaperRecipe:
        """From its file, checked. Raises InputError."""
        recipe: PaperRecipe = typed(cls, read_recipe(path), "")
        for name, expected in recipe.expectations.items():
            expected.check(name)
        return recipe

    @property
    def expectations(self) -> dict[str, Expected]:
        return {name: typed(Expected, tree, f"expected.{name}.") for name, tree in self.expected.items()}


@dataclass(frozen=True)
class Verdict:
    """One expected value beside what was found."""

    name: str
    found: float | None
    expected: str
    source: str
    met: bool


def root() -> Path:
    """Where the recipes are: inside the installed package, or at the top of the repository."""
    packaged = Path(str(files("obsprune"))) / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "recipes"


def names() -> list[str]:
    """All recipes, PAPER/NAME."""
    return sorted(path.relative_to(root()).with_suffix("").as_posix() for path in root().glob("*/*.yaml"))


def needs_gpu(name: str) -> bool:
    """Whether the recipe's first line says so."""
    with (root() / f"{name}.yaml").open(encoding="utf-8") as file:
        return "; needs a GPU" in file.readline()


def paths_of(name: str, others: Iterable[str] = (), large: bool = False) -> dict[str, Path]:
    """The recipes that a name means, by their own: a paper's, one of them, or a YAML file. others: names that are known
    too, for the message; large: a paper's are those that need a GPU, too. Raises InputError.
    """
    if name.endswith((".yaml", ".yml")):
        return {Path(name).stem: Path(name)}
    own = [known for known in names() if known.partition("/")[0] == name]
    found = [known for known in names() if known == name] or [known for known in own if large or not needs_gpu(known)]
    if own and not found:
        raise InputError(f"all of {name} need a GPU; name one of {', '.join(own)}, or see what they are with --dry-run")
    if not found:
        papers = {known.partition("/")[0] for known in names()}
        raise InputError(f"unknown recipe '{name}'; {nearest(name, {*papers, *names(), *others})}")
    return {known: root() / f"{known}.yaml" for known in found}


def opened(path: Path, smoke: bool = False, changes: Tree | None = None) -> tuple[PaperRecipe, Study]:
    """A recipe and its study, with the recipe's smoke settings if they are asked for, and changes of them. Raises
    InputError.
    """
    recipe = PaperRecipe.read(path)
    settings = merge(recipe.settings, recipe.smoke if smoke else {}, changes or {})
    study: Study = typed(find_study(recipe.study), settings, "settings.")
    if study.seeds < 1:
        raise InputError(f"seeds is {study.seeds}; a number from 1 up is expected")
    return recipe, study


def planned(
    paths: Mapping[str, Path], material: Material, smoke: bool, changes: Tree
) -> tuple[dict[str, Outcome], dict[str, str]]:
    """What recipes come to and, of those that cannot be planned, why. Raises InputError when none can be."""
    studies = {name: opened(path, smoke, changes)[1] for name, path in paths.items()}
    plans: dict[str, Outcome] = {}
    reasons: dict[str, str] = {}
    for name, study in studies.items():
        try:
            plans[name] = study.plan(material)
        except InputError as error:
            reasons[name] = str(error)
    if not plans:
        raise InputError("; ".join(reasons.values() if len(reasons) == 1 else map(": ".join, reasons.items())))
    return plans, reasons


@dataclass(frozen=True)
class Experiment:
    """A recipe that can be run. changes: settings that are not the recipe's."""

    recipe: PaperRecipe
    study: Study
    output: Path
    material: Material
    smoke: bool
    changes: Tree

    @classmethod
    def prepare(
        cls,
        path: Path,
        output: Path,
        material: Material,
        smoke: bool = False,
        changes: Tree | None = None,
        force: bool = False,
    ) -> Experiment:
        """All that can be refused before the work. A smoke run takes the recipe's smoke settings.

        Raises InputError, also when `output` holds anything but, with `force`, results of a former run.
        """
        recipe, study = opened(path, smoke, changes)
        study.require(material)
        _require_free(output, force)
        require_matplotlib()
        return cls(recipe, study, output, material, smoke, changes or {})

    def run(self, progress: Progress) -> Tree:
        """Writes results.json, results.md and the figures to `output`; returns the results. Of a smoke run only those
        values are held against `expected` that say so. Its `seconds` are those of this part where a stopped run was
        `resumed`. Raises InputError and OutputError.
        """
        start, resumed = time.perf_counter(), self.unfinished.is_dir()
        outcome = self._outcome(progress)
        results = self._results(outcome) | {"seconds": time.perf_counter() - start, "resumed": resumed}
        write_results(self.output, results, outcome)
        return results

    @property
    def unfinished(self) -> Path:
        """Where a long study keeps what it has done, beside the results to come."""
        return self.output.with_name(f"{self.output.name}-unfinished")

    def _outcome(self, progress: Progress) -> Outcome:
        try:
            return self.study.run(replace(self.material, work=self.unfinished), progress)
        except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            if not self.changes:
                raise
            told = ", ".join(f"{name}={value}" for name, value in self.changes.items())
            raise InputError(f"{self.recipe.study} does not work with {told}: {first_line(error)}") from error

    def _results(self, outcome: Outcome) -> Tree:
        wanted = {name: one for name, one in self.recipe.expectations.items() if one.smoke or not self.smoke}
        return {
            "study": self.recipe.study,
            "smoke": self.smoke,
            "settings": dataclasses.asdict(self.study),
            "verdicts": [dataclasses.asdict(verdict) for verdict in judge(wanted, outcome.values)],
            "values": {name: value if math.isfinite(value) else None for name, value in outcome.values.items()},
            "tables": [dataclasses.asdict(table) for table in outcome.tables],
            "facts": dict(outcome.facts),
            "versions": {"obsprune": __version__, "torch": torch.__version__, "python": platform.python_version(),
                         "transformers": version("transformers")},
        }  # fmt: skip


def judge(expectations: Mapping[str, Expected], values: Mapping[str, float]) -> list[Verdict]:
    """Every expected value beside the one found; one that was not measured, or is no finite number, is not met."""
    return [_verdict(name, one, values.get(name, math.nan)) for name, one in expectations.items()]


def _verdict(name: str, expected: Expected, found: float) -> Verdict:
    sound = math.isfinite(found)
    return Verdict(name, found if sound else None, str(expected), expected.source, sound and expected.met(found))


def write_results(output: Path, results: Tree, outcome: Outcome) -> None:
    """Figures first, results.json last: with it the results are whole. Raises OutputError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / RESULTS).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {output}: {error.strerror}; choose another -o") from error
    for figure in outcome.figures:
        save(figure, output)
    write_text(output / TABLES, "\n\n".join(markdown(table) for table in outcome.tables) + "\n")
    write_text(output / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def markdown(table: Table) -> str:
    """A table in Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join([f"**{table.title}**", "", *(f"| {' | '.join(map(cell, line))} |" for line in lines)])


def cell(value: Cell) -> str:
    """A table's cell as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _require_free(output: Path, force: bool) -> None:
    found: Iterable[Any] = output.iterdir() if output.is_dir() else [output] if output.exists() else []
    if not any(found):
        return
    if not (output / RESULTS).is_file():
        raise InputError(f"{output} holds something that is no result of a recipe; choose another -o")
    if not force:
        raise InputError(f"{output} holds the results of a former run; use --force or another -o")
