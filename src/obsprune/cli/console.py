"""How a run looks: progress on stderr, results on stdout, and the one table from errors to messages and exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from textwrap import wrap
from typing import Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape

from obsprune.cli.bars import Ahead, Picture, left
from obsprune.errors import InputError, NotPositiveDefinite, ObspruneError, OutputError, WalkMismatch, printable
from obsprune.progress import Pace


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as schedulers send it before they kill."""


EXIT_CODES: dict[type[BaseException], int] = {
    InputError: 2,
    OutputError: 2,
    NotPositiveDefinite: 2,
    WalkMismatch: 1,
    ObspruneError: 1,
    Terminated: 143,
    KeyboardInterrupt: 130,
}
"""2 is what the user can mend."""
GO_ON = "repeat the same command to go on"
"""After a signal, where a command says nothing else."""
LONGEST = 1500
"""Characters of a message."""
PLAIN_SECONDS, SILENT_SECONDS = 5.0, 60.0
"""Without a terminal, one line of progress at most so often, and one that only says how far it is."""
UNFOLDED = 100
"""Columns of a table that goes into a file, at least."""

err = Console(stderr=True, highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Other libraries' chatter stays out of our logs; called before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what it logs of damaged files, its errors say too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get("OBSPRUNE_DEBUG"):
        warnings.filterwarnings("ignore")


def safe(text: str) -> str:
    """Of a text that may hold anything: no secrets, no language of terminals, no markup."""
    return escape(printable(text))


def shortened(message: str) -> str:
    """Without the middle where it is very long: a message may quote a value of any length."""
    left, right = message[: 2 * LONGEST // 3], message[-LONGEST // 3 :]
    return message if len(message) <= LONGEST else f"{left} … {right}"


@contextmanager
def guarded(when_stopped: str = GO_ON) -> Iterator[None]:
    """Turns expected errors into one sentence on stderr and their exit code; OBSPRUNE_DEBUG=1 shows the traceback.
    when_stopped: what a signal leaves the user to do.
    """
    former = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except tuple(EXIT_CODES) as error:
        if os.environ.get("OBSPRUNE_DEBUG"):
            for line in "".join(traceback.format_exception(error)).splitlines():
                err.print(safe(line))
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        message = f"stopped; {when_stopped}" if code > 128 else str(error)
        if not _told_elsewhere(error):
            err.print(f"[bold red]error:[/] {escape(shortened(printable(message)))}")
        sys.exit(code)
    finally:
        signal.signal(signal.SIGTERM, former)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def _told_elsewhere(error: BaseException) -> bool:
    """Of several processes with the same error the first one tells it."""
    everywhere = isinstance(error, KeyboardInterrupt) or getattr(error, "shared", False)
    return everywhere and os.environ.get("RANK", "0") != "0"


def tell(found: dict[str, Any], shown: Iterable[Any], as_json: bool) -> None:
    """A result: for a machine as JSON on stdout; for a person what is shown on stderr, and on stdout where it is."""
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for one in shown:
        show(one)
    if "output" in found:
        typer.echo(found["output"])


def show(table: Any) -> None:
    """On stderr; what goes into a file is folded late, and nothing stands behind its lines."""
    if err.is_terminal:
        err.print(table, soft_wrap=False)
        return
    page = StringIO()
    Console(file=page, width=max(err.width, UNFOLDED), highlight=False).print(table)
    for line in page.getvalue().splitlines():
        err.print(escape(line.rstrip()))


class Watch:
    """Progress as a bar on a terminal, as plain lines elsewhere."""

    def __init__(self, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.quiet, self.clock = quiet, clock
        self.live = err.is_terminal and not err.is_dumb_terminal and not quiet
        self.title, self.text, self.pace, self.after = "", "", Pace(0, clock=clock), Ahead()
        self.said, self.noticed = clock(), list[str]()
        self.bar = Live(get_renderable=self._picture, console=err, transient=True)

    def __enter__(self) -> Watch:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.bar.stop()

    def stage(self, title: str, total: int, costs: Sequence[float] = ()) -> None:
        """Begins a bar, or a line."""
        self.title, self.text, self.pace = title, "", Pace(total, costs, self.clock)

    def step(self, text: str = "", fresh: bool = True) -> None:
        """Moves the bar; a block's summary stays on the screen."""
        self.text = ""
        self.pace.step(fresh)
        if self._due(text):
            self._line(f"[{self.pace.done}/{self.pace.total}] {text or self.title}{self._left()}")

    def detail(self, text: str) -> None:
        """Shows what is being worked on, under the bar."""
        self.text = text

    def ahead(self, seconds: float, then: str = "") -> None:
        """Counts what is known of the rest of the run, too."""
        self.after = Ahead(seconds, then)

    def notice(self, text: str) -> None:
        """A line that stays; the same one comes once."""
        if text not in self.noticed:
            self.noticed.append(text)
            self._line(f"note: {text}")

    def line(self, text: str) -> None:
        """A line that stays, as it is."""
        self._line(text)

    def _picture(self) -> Group:
        return Group(Picture(self.title, self.pace, self.after, self.text)) if self.title else Group()

    def _due(self, text: str) -> bool:
        """Plain lines are thinned out, so that a log of a long run stays readable; the last one is always there."""
        if self.live or not text:
            return bool(text) or (not self.live and self.clock() - self.said >= SILENT_SECONDS)
        return self.pace.done in (1, self.pace.total) or self.clock() - self.said >= PLAIN_SECONDS

    def _left(self) -> str:
        told = "" if self.live else left(self.pace, self.after)
        return f"  {told}" if told else ""

    def _line(self, text: str) -> None:
        """On a terminal folded between words."""
        if not self.quiet:
            folded = wrap(printable(text), err.width, subsequent_indent="  ") if err.is_terminal else [printable(text)]
            for line in folded:
                err.print(escape(line))
            self.said = self.clock()
