"""Several processes that work on one model: what each takes of the samples, and what they tell each other.

Every process walks the whole model with its own share of the samples. What is summed over tokens is added up over the
processes, matrices are dealt out to be solved, and their answers are given to all, so that all hold the same weights at
any time. One process is the trivial case of the same lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar, final

from torch import Tensor

from obsprune.errors import InputError

T = TypeVar("T")


class Ranks(ABC):
    """One process among `size`, number `rank`. All of them must come to the same calls in the same order."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether it is the process that writes, and talks to the user."""
        return self.rank == 0

    @abstractmethod
    def device(self, asked: str) -> str:
        """The device this process is to use, when the user asked for one by this name."""

    @abstractmethod
    def sum(self, tensors: Sequence[Tensor], owners: Collection[int] = ()) -> None:
        """Adds up tensors over all processes, in place; `owners`: those who need the result (none named: all do), what
        the others hold afterwards is undefined.
        """

    @abstractmethod
    def give(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrites a tensor with that of the process `source`."""

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """The plain values of all processes, by rank."""

    @abstractmethod
    def told(self, find: Callable[[], T]) -> T:
        """What the first process finds (a plain value); an error of its is raised in all."""

    @abstractmethod
    def agree(self, work: Callable[[], T]) -> T:
        """What this process finds, once all have found something; an error of any is raised in all."""

    def wait(self) -> None:
        """Until all are here: what the first one has written can be read now."""
        self.gather(None)

    def mine(self, count: int) -> range:
        """Which of `count` samples are this process's: dealt out one by one. Raises InputError when some get none."""
        if count < self.size:
            raise InputError(
                f"{count} samples cannot be shared by {self.size} processes; use more samples, or fewer processes"
            )
        return range(self.rank, count, self.size)

    def part(self, count: int, size: int) -> int:
        """How many samples of this process make a batch, when all of them together work on `size` of `count` at a time:
        at least one, and so many that all have the same number of batches.
        """
        least, most = count // self.size, -(-count // self.size)
        part = max(1, -(-size // self.size))
        while -(-least // part) != -(-most // part):
            part += 1
        return part


@final
class Alone(Ranks):
    """The only process."""

    rank, size = 0, 1

    def device(self, asked: str) -> str:
        return asked

    def sum(self, tensors: Sequence[Tensor], owners: Collection[int] = ()) -> None:
        """The sum of one."""

    def give(self, tensor: Tensor, source: int = 0) -> None:
        """It has it."""

    def gather(self, value: T) -> list[T]:
        return [value]

    def told(self, find: Callable[[], T]) -> T:
        return find()

    def agree(self, work: Callable[[], T]) -> T:
        return work()


ALONE = Alone()


def deal(costs: Sequence[float], size: int) -> list[int]:
    """The rank for each piece of work: the costliest first, each to whoever has least to do so far."""
    load, owners = [0.0] * size, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        owners[place] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owners[place]] += costs[place]
    return owners
