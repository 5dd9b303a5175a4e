"""What a study is: an experiment of a paper, run from settings; its numbers, tables and figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, stdev

from obsprune.errors import InputError
from obsprune.progress import Progress
from obsprune.report.figures import Figure
from obsprune.studies.material import Material

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """Rows under columns, for README and terminal; floats are written with four significant digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Outcome:
    """What came out. values: by name, what a recipe's `expected` is held against; facts: where the data came from, and
    what else a reader must know to judge the numbers.
    """

    values: Mapping[str, float]
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study(ABC):
    """A frozen dataclass; its fields are the settings of a recipe. seeds: how often all is repeated, seeds 0, 1, …"""

    seeds: int = 1

    def require(self, material: Material) -> None:
        """Raises InputError when the material lacks what `run` will ask for."""
        return

    def plan(self, material: Material) -> Outcome:
        """What `run` comes to, found without any work and, where the recipe names a shape, without data. Raises
        InputError when a setting cannot be, or there is nothing to plan.
        """
        raise InputError("this experiment has nothing to plan: run it with --smoke")

    @abstractmethod
    def run(self, material: Material, progress: Progress) -> Outcome:
        """Does it all. Raises InputError when data is needed that the material has not, or a setting cannot be."""


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, as a table's cell."""
    several = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{several}"


def best_and_median(values: Sequence[float]) -> str:
    """Smallest and median, as a table's cell."""
    return f"{min(values):g} (median {median(values):g})"
