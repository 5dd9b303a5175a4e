"""The dense model as a teacher: what it answers is kept, and laid beside the pruned model's answers.

Of a language model the final hidden states are kept, and its logits made again wherever they are needed: both models
share one output head, which is not pruned, so the teacher's states go through it beside the pruned model's, and
whatever the architecture does after it (scaling, capping) is done to both. Of a classifier the few logits are kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from obsprune.core.losses import agreement, divergence, log_probabilities
from obsprune.engine.dealing import total
from obsprune.engine.place import Dense, Place, Source
from obsprune.models.samples import Batch, Samples

Running = Callable[[], int]
"""Which batch is under way."""


@dataclass(frozen=True)
class Score:
    """Distance from the dense model in nats a prediction; the model's own loss (Kind.loss); the share of predictions
    with the dense model's first choice.
    """

    kl: float
    nll: float
    agreement: float


class Memory(ABC):
    """What is kept of the dense model's answers, by batch."""

    @abstractmethod
    def learning(self, running: Running) -> Any:
        """A context: while open, the dense model's forwards are listened to."""

    @abstractmethod
    def answered(self, key: int, output: Any) -> None:
        """The dense model's own output for a batch."""

    @abstractmethod
    def beside(self, running: Running) -> Any:
        """A context: while open, `pair` can be asked of the pruned model's outputs."""

    @abstractmethod
    def pair(self, key: int, output: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the pruned model and of the dense one."""


@final
class HiddenStates(Memory):
    """What the dense model hands to its head."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.hidden: dict[int, Tensor] = {}

    @contextmanager
    def learning(self, running: Running) -> Iterator[None]:
        def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.hidden[running()] = args[0]

        handle = self.head.register_forward_pre_hook(listen)
        try:
            yield
        finally:
            handle.remove()

    def answered(self, key: int, output: Any) -> None:
        """Nothing: the logits are not kept."""

    @contextmanager
    def beside(self, running: Running) -> Iterator[None]:
        """The head sees a batch's hidden states followed by the teacher's."""

        def join(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            teacher = self.hidden[running()]
            return (torch.cat([args[0], teacher.to(args[0].device)]), *args[1:])

        handle = self.head.register_forward_pre_hook(join)
        try:
            yield
        finally:
            handle.remove()

    def pair(self, key: int, output: Any) -> tuple[Tensor, Tensor]:
        student, teacher = log_probabilities(output.logits).chunk(2)
        return student, teacher


@final
class Logits(Memory):
    """The logits themselves."""

    def __init__(self) -> None:
        self.logits: dict[int, Tensor] = {}

    @contextmanager
    def learning(self, running: Running) -> Iterator[None]:
        yield

    def answered(self, key: int, output: Any) -> None:
        self.logits[key] = output.logits

    @contextmanager
    def beside(self, running: Running) -> Iterator[None]:
        yield

    def pair(self, key: int, output: Any) -> tuple[Tensor, Tensor]:
        return log_probabilities(output.logits), log_probabilities(self.logits[key])


@dataclass(frozen=True)
class Lesson:
    """This process's batches of one draw, in order, and what the dense model answered; predictions: of all processes;
    crossing: bytes that leave the blocks for one batch, all of them together.
    """

    place: Place
    batches: list[Batch]
    memory: Memory
    predictions: int
    crossing: int

    def divergence(self, key: int, output: Any) -> Tensor:
        """KL(dense ‖ pruned), summed over a batch."""
        return divergence(*self.memory.pair(key, output))

    def score(self, weights: Source) -> Score:
        """How far the model with these weights is from the dense one; infinitely far when its logits are not finite."""
        place, kind = self.place, self.place.model.kind
        sums = torch.zeros(4, dtype=torch.float64)

        def finish(key: int, output: Any) -> None:
            s, t = self.memory.pair(key, output)
            loss, count = kind.loss(s, t, self.batches[key])
            sums.add_(torch.stack([divergence(s, t), loss, agreement(s, t), loss.new_tensor(count)]).double().cpu())

        walk = place.model.walk(self.batches, finish)
        with walk, self.memory.beside(walk.current):
            for stop in walk:
                with place.at(stop.index, weights):
                    stop.hand_on()
        place.model.ranks.sum([sums])
        kl, nll, agreed, count = sums.tolist()
        kl, nll = kl / self.predictions, nll / count
        return Score(kl, nll, agreed / self.predictions) if math.isfinite(kl + nll) else Score(math.inf, math.inf, 0.0)


def teach(place: Place, samples: Samples, size: int) -> Lesson:
    """Walks the dense model over some samples, `size` in a batch of all processes together."""
    model = place.model
    batches = model.shared(samples, size)
    memory: Memory = HiddenStates(model.head) if model.kind.positional else Logits()
    crossing = 0
    walk = model.walk(batches, memory.answered)
    with walk, memory.learning(walk.current):
        for stop in walk:
            with place.at(stop.index, Dense()):
                for key in stop.keys:
                    output = stop.run(key)
                    crossing += tensor_bytes(output) if key == 0 else 0
                    stop.leave(key, output)
    (predictions,) = total(model.ranks, [sum(map(model.kind.predictions, batches))])
    return Lesson(place, batches, memory, int(predictions), crossing)


def tensor_bytes(tree: Any) -> int:
    """Of all tensors in what a block returned."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor))
