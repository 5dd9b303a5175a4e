"""Fine-tuning between two projections: Adam on KL(dense ‖ pruned) over the prunable weights alone, float32 masters.

With the mask kept, pruned weights stay zero and the survivors move. Without it (the second form of I-OBS, Wu et al.
2024, appendix on large models) every weight may come back, and the projection that follows decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from obsprune.core.optimizers import Adam, cosine
from obsprune.engine.gradients import Sums, gradients, graph_bytes, whole_gradients
from obsprune.engine.place import Source, Store, copied
from obsprune.engine.teacher import Lesson
from obsprune.models.blocks import Block
from obsprune.ranks import Ranks

RATES = [1e-5 * 10 ** (power / 2) for power in range(9)]
"""Learning rates tried at first, from the middle one on, until the held-out divergence rises."""
DECAY = 0.75
"""The rate of a round as a share of the round before it."""


@dataclass(frozen=True)
class Tuning:
    """`passes` over a lesson, each of `steps` steps, the rate falling to zero by a cosine; masked: zeros stay."""

    steps: int
    masked: bool
    passes: int = 1

    def shares(self, lesson: Lesson) -> list[range]:
        """The batches of each step of all passes, in order; at least one a step."""
        count = len(lesson.batches)
        steps = min(self.steps, count)
        edges = [round(count * step / steps) for step in range(steps + 1)]
        return [range(a, b) for a, b in pairwise(edges)] * self.passes

    def run(
        self, weights: Source, lesson: Lesson, shares: Sequence[Sequence[int]], rate: float, step: Callable[[], None]
    ) -> Store:
        """The weights after the pass, in a new store; `step` is called after each optimizer step."""
        place = lesson.place
        masters = copied(weights, place, "masters")
        state = place.store("adam")
        differentiate = whole_gradients if place.holds(partial(graph_bytes, lesson)) else gradients
        for number, keys in enumerate(shares, 1):
            now = rate * cosine((number - 1) / len(shares))
            update = partial(self._update, place.model.ranks, masters, state, number, now)
            differentiate(lesson, keys, masters, lambda block: Sums(), update)
            step()
        return masters

    def _update(
        self, ranks: Ranks, masters: Store, state: Store, number: int, rate: float, block: Block, sums: Sums
    ) -> None:
        sums.add_up(ranks)
        weights = masters.get(block)
        moments = state.get(block) if number > 1 else {}
        for name, gradient in sums.gradients.items():
            W = weights[name]
            keep = W != 0
            m = moments.setdefault(f"m {name}", torch.zeros_like(W))
            v = moments.setdefault(f"v {name}", torch.zeros_like(W))
            Adam().step(W, gradient * keep if self.masked else gradient, m, v, rate, number)
            if self.masked:
                W.mul_(keep)
        masters.put(block, weights)
        state.put(block, moments)


def search(rates: Sequence[float], divergence: Callable[[float], float]) -> tuple[float, float]:
    """(the best rate, its divergence) of ascending rates: from the middle one up as long as it falls, or else down."""
    found: dict[int, float] = {}

    def better(index: int, than: int) -> bool:
        if not 0 <= index < len(rates):
            return False
        found[index] = divergence(rates[index])
        return found[index] < found[than]

    start = best = len(rates) // 2
    found[start] = divergence(rates[start])
    while better(best + 1, best):
        best += 1
    while best <= start and better(best - 1, best):
        best -= 1
    return rates[best], found[best]
