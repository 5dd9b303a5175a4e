"""Where the time of a run goes: every moment belongs to one phase, the innermost that is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

from obsprune.bench.work import Work

REST = "rest"
"""What lies in no phase."""
Inner = Callable[[str, str], str]
"""From the name of a phase, and what phases inside the one around it are called, to what those inside it are called:
`{}` stands for their own name.
"""


def part(name: str, around: str) -> str:
    """Phases inside this one stand beside it."""
    return around


def stage(name: str, around: str) -> str:
    """They are told apart from others of their name."""
    return f"{name}: {{}}"


def whole(name: str, around: str) -> str:
    """They are this phase itself."""
    return name


@final
@dataclass
class Phase:
    """seconds: without those of phases inside it; work: the least that it had to do."""

    name: str
    seconds: float = 0.0
    calls: int = 0
    work: Work = field(default_factory=Work)

    def tree(self, rates: Mapping[str, float]) -> dict[str, Any]:
        """As plain values. limit: seconds at the machine's ceilings; share: of them in the seconds it took, 1 is as
        fast as the machine can be.
        """
        limit = self.work.limit(rates)
        return {
            "phase": self.name,
            "seconds": self.seconds,
            "calls": self.calls,
            "flops": dict(self.work.flops),
            "bytes": dict(self.work.moved),
            "limit": limit,
            "share": limit / self.seconds if self.seconds else 0.0,
        }


@dataclass(frozen=True)
class Open:
    """A phase that is under way. within: what a phase inside it is called, from its own name."""

    phase: Phase
    within: str


@final
class Recorder:
    """The phases of one run. clock: seconds, once the device has done what it was given."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.phases = clock, dict[str, Phase]()
        self.stack = [Open(self._phase(REST), "{}")]
        self.began = self.last = clock()

    @contextmanager
    def open(self, name: str, inner: Inner = part) -> Iterator[None]:
        """A phase while open. inner: what becomes of phases inside it."""
        above = self.stack[-1]
        phase = self._phase(above.within.format(name))
        self._lap()
        here = Open(phase, inner(phase.name, above.within))
        self.stack.append(here)
        try:
            yield
        finally:
            self._lap()
            phase.calls += 1
            assert self.stack.pop() is here

    def add(self, work: Work) -> None:
        """Work of the phase that is open."""
        self.stack[-1].phase.work.add(work)

    @property
    def total(self) -> float:
        """Seconds up to the last phase's end."""
        return self.last - self.began

    def _phase(self, name: str) -> Phase:
        return self.phases.setdefault(name, Phase(name))

    def _lap(self) -> None:
        now = self.clock()
        self.stack[-1].phase.seconds += now - self.last
        self.last = now
