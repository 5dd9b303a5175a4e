"""What a model is run on: rows of token ids, or images; drawn from a source, turned into batches when they are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""Keyword arguments of a model's forward."""


class Samples(ABC):
    """Some inputs in their order; cheap to pick from, since what is large is made by `batches`. unit: what one is."""

    unit: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Samples:
        """Those at these places, in this order."""

    @abstractmethod
    def batches(self, size: int, device: torch.device) -> list[Batch]:
        """All of them as keyword arguments of the model, `size` in each batch."""

    @abstractmethod
    def content_hash(self) -> str:
        """SHA-256 of what they hold: the same inputs give the same hash, wherever they came from."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a report says about them: how many of what, how large."""

    @property
    def noun(self) -> str:
        """What they are, in a sentence."""
        return self.unit

    @property
    def remedy(self) -> str:
        """What to do where there are too few."""
        return f"give more {self.unit}, or a smaller --nsamples"

    @property
    @abstractmethod
    def positions(self) -> int:
        """Predictions in one sample: its tokens, or 1 for an image."""

    @property
    @abstractmethod
    def together(self) -> int:
        """How many make a forward of a good size."""


class Source(ABC):
    """Something samples are drawn from. name: what the user called it."""

    name: str

    @abstractmethod
    def sample(self, needed: int, generator: torch.Generator, more: int = 0) -> Samples:
        """At least `needed` samples in random order, or all there are; then `more` others, if there are.

        The first `needed` do not depend on `more`.
        """

    @abstractmethod
    def notices(self) -> list[str]:
        """What the user should know about what was drawn: damaged files, a shorter length."""
