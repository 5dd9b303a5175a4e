"""The dense model as a teacher: its final hidden states are kept, and its logits made again wherever they are needed.

Both models share one output head, which is not pruned: the teacher's hidden states are laid beside the pruned model's
in front of the head, and whatever the architecture does after it (scaling, capping) is done to both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obsprune.core.losses import divergence, log_probabilities, next_token_nll, perplexity
from obsprune.engine.place import Dense, Place, Source
from obsprune.models.data import batches
from obsprune.models.walk import Walk


@dataclass(frozen=True)
class Score:
    """Distance from the dense model and from the text, both per token in nats."""

    kl: float
    nll: float

    @property
    def perplexity(self) -> float:
        return perplexity(self.nll)


@dataclass(frozen=True)
class Lesson:
    """Batches of one draw, in order, and the dense model's final hidden states for each."""

    place: Place
    batches: list[dict[str, Tensor]]
    hidden: list[Tensor]

    @property
    def tokens(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.batches)

    @contextmanager
    def beside(self, running: Callable[[], int]) -> Iterator[None]:
        """While open, the head sees a batch's hidden states followed by the teacher's. running: which batch it is."""

        def join(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            teacher = self.hidden[running()]
            return (torch.cat([args[0], teacher.to(args[0].device)]), *args[1:])

        handle = self.place.model.head.register_forward_pre_hook(join)
        try:
            yield
        finally:
            handle.remove()

    def score(self, weights: Source) -> Score:
        """How far the model with these weights is from the dense one; infinitely far when its logits are not finite."""
        sums = torch.zeros(2, dtype=torch.float64)

        def finish(key: int, output: Any) -> None:
            student, teacher = log_probabilities(output.logits).chunk(2)
            ids = self.batches[key]["input_ids"]
            sums.add_(torch.stack([divergence(student, teacher), next_token_nll(student, ids)]).double().cpu())

        place, modules = self.place, [block.module for block in self.place.model.blocks]
        walk = Walk(place.model.network, modules, self.batches, finish)
        with walk, self.beside(walk.current):
            for stop in walk:
                with place.at(stop.index, weights):
                    stop.hand_on()
        kl, nll = (sums / torch.tensor([self.tokens, self.tokens - sum(map(_rows, self.batches))])).tolist()
        return Score(kl, nll) if math.isfinite(kl + nll) else Score(math.inf, math.inf)


def _rows(batch: dict[str, Tensor]) -> int:
    return len(batch["input_ids"])


def teach(place: Place, rows: Tensor, size: int) -> Lesson:
    """Walks the dense model over token rows [n, seqlen], `size` rows a batch."""
    parts = batches(rows, size, place.model.device)
    hidden: dict[int, Tensor] = {}
    walk = Walk(place.model.network, [block.module for block in place.model.blocks], parts)

    def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
        hidden[walk.current()] = args[0]

    handle = place.model.head.register_forward_pre_hook(listen)
    try:
        with walk:
            for stop in walk:
                with place.at(stop.index, Dense()):
                    stop.hand_on()
    finally:
        handle.remove()
    return Lesson(place, parts, [hidden[key] for key in range(len(parts))])
