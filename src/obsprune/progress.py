"""What a long computation tells whoever is watching. The library reports; the CLI decides how it looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, final


class Progress(Protocol):
    """A watcher of one run."""

    def stage(self, title: str, total: int, costs: Sequence[float] = ()) -> None:
        """A stage of `total` steps begins; the one before it is over. costs: what each step takes beside the others, in
        any unit; empty where they are equal.
        """

    def step(self, text: str = "", fresh: bool = True) -> None:
        """One step of the stage is done; `text` says what came out of it. fresh: False for one that a former part of
        the run had done, and that took no time now.
        """

    def detail(self, text: str) -> None:
        """What is being worked on right now, inside a step."""

    def ahead(self, seconds: float, then: str = "") -> None:
        """What follows this stage and those like it: as many seconds as are known, and what of unknown length."""

    def notice(self, text: str) -> None:
        """Something the user should know, and that stays on the screen."""

    def line(self, text: str) -> None:
        """An intermediate result that stays on the screen."""


class Silent:
    """The watcher who does not look."""

    def stage(self, title: str, total: int, costs: Sequence[float] = ()) -> None: ...
    def step(self, text: str = "", fresh: bool = True) -> None: ...
    def detail(self, text: str) -> None: ...
    def ahead(self, seconds: float, then: str = "") -> None: ...
    def notice(self, text: str) -> None: ...
    def line(self, text: str) -> None: ...


@final
class Pace:
    """How long a stage will go on, from the steps that are done. A step takes as long as those of its cost did; where
    none of them is done, as long as its cost says beside all that are. The first step of a stage also pays for what is
    done once, and does not count where another one of its cost does.
    """

    def __init__(self, total: int, costs: Sequence[float] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.costs, self.clock = total, list(costs) or [1.0] * total, clock
        self.began = self.last = clock()
        self.done = 0
        self.took: list[tuple[float, float]] = []
        """(cost, seconds) of the fresh steps."""

    def step(self, fresh: bool = True) -> None:
        """One more is done."""
        now = self.clock()
        if fresh and self.done < self.total:
            self.took.append((self.costs[self.done], now - self.last))
        self.done, self.last = self.done + 1, now

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return self.clock() - self.began

    def left(self) -> float | None:
        """Seconds until the stage is over; None as long as no step was measured."""
        if not self.took:
            return None
        current, *later = [self._expected(cost) for cost in self.costs[self.done :]] or [0.0]
        return max(current - (self.clock() - self.last), 0.0) + sum(later)

    def _expected(self, cost: float) -> float:
        alike = [one for one in self.took[1:] if one[0] == cost] or [one for one in self.took if one[0] == cost]
        counted = alike or self.took
        return cost * sum(seconds for _, seconds in counted) / sum(cost for cost, _ in counted)
