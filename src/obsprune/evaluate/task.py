"""A task: something that a model can be scored on, item by item, so that two models can be compared in pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from obsprune.models.load import Model
from obsprune.progress import Progress


@dataclass(frozen=True)
class Scored:
    """values: plain values for a report, the metrics by name and the whole protocol; items: {quantity: one value for
    each document, image or question, in the task's order}, for paired comparisons.
    """

    values: dict[str, Any]
    items: dict[str, list[float]] = field(default_factory=dict)

    def numbers(self, metric: str) -> dict[str, Any]:
        """The name of the headline, and all that was measured, without the protocol."""
        return {"metric": metric, **{name: value for name, value in self.values.items() if isinstance(value, float)}}


class Task(ABC):
    """name: as the user gave it; metric: the headline among the values; protocol: with a `sha256` of the material."""

    name: str
    metric: str
    protocol: dict[str, Any]

    @property
    def material(self) -> str:
        """Equal for two models when they are asked the same, each in its own way."""
        return str(self.protocol["sha256"])

    @abstractmethod
    def score(self, model: Model, progress: Progress, who: str) -> Scored:
        """Runs the model over the task; `who` says in the progress which model it is."""
