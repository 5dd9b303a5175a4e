"""How progress looks on a terminal: a bar with what is left, and under it what is being worked on."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from obsprune.errors import printable
from obsprune.progress import Pace

ROOMY = 100
"""Columns from which on the bar is longer."""
SHORTEST = 3
"""Columns of a bar, at least."""


@dataclass(frozen=True)
class Ahead:
    """What follows a stage: as many seconds as are known, and what of unknown length."""

    seconds: float = 0.0
    then: str = ""

    @property
    def words(self) -> str:
        """What stands behind a time."""
        return f", then {self.then}" if self.then else ""


@dataclass(frozen=True)
class Picture:
    """A stage at this moment, never wider than the terminal. detail: what is being worked on."""

    title: str
    pace: Pace
    ahead: Ahead
    detail: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pace = self.pace
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for flexible in (False, False, False, False, True):
            grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1 if flexible else None)
        bar = ProgressBar(max(pace.total, 1), pace.done, width=self._room(options.max_width))
        counted = f"{pace.done}/{pace.total}"
        grid.add_row(Text(printable(self.title)), bar, counted, clock(pace.elapsed), left(pace, self.ahead))
        yield grid
        if self.detail:
            yield Text(printable(self.detail), style="dim", no_wrap=True, overflow="ellipsis")

    def _room(self, columns: int) -> int:
        """Of the bar: less where the words beside it are long; as much all through a stage."""
        total = self.pace.total
        widest = "".join([printable(self.title), f"{total}/{total}", clock(0), f"{clock(0)} left", self.ahead.words])
        return max(SHORTEST, min(24 if columns >= ROOMY else 16, columns - cell_len(widest) - 4 * len("  ")))


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def left(pace: Pace, ahead: Ahead) -> str:
    """How long a stage and what is known of the rest will take; nothing where that is not known, or over."""
    seconds = pace.left()
    if seconds is None or pace.done >= pace.total:
        return ""
    return f"{clock(seconds + ahead.seconds)} left{ahead.words}"
