"""How a run looks: progress on stderr, results on stdout, and the one table from errors to messages and exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from obsprune.errors import InputError, NotPositiveDefinite, ObspruneError, OutputError, WalkMismatch, printable


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
LONGEST = 1500
"""Characters of a message."""
PLAIN_SECONDS = 5.0
"""Without a terminal, one line of progress at most so often."""

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
def guarded() -> Iterator[None]:
    """Turns expected errors into one sentence on stderr and their exit code; OBSPRUNE_DEBUG=1 shows the traceback."""
    former = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except tuple(EXIT_CODES) as error:
        if os.environ.get("OBSPRUNE_DEBUG"):
            for line in "".join(traceback.format_exception(error)).splitlines():
                err.print(safe(line))
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        message = "stopped; repeat the same command to go on" if code > 128 else str(error)
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
        err.print(one)
    if "output" in found:
        typer.echo(found["output"])


class Watch:
    """Progress as bars on a terminal, as plain lines elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.live = quiet, err.is_terminal and not quiet
        self.bars = Bars(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("[dim]{task.fields[text]}"), console=err, transient=True,
        )  # fmt: skip
        self.title, self.total, self.done, self.began, self.said = "", 0, 0, 0.0, 0.0

    def __enter__(self) -> Watch:
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.bars.stop()

    def stage(self, title: str, total: int) -> None:
        """Begins a bar, or a line."""
        self.title, self.total, self.done, self.began = title, total, 0, time.monotonic()
        if self.live:
            for task in self.bars.task_ids:
                self.bars.remove_task(task)
            self.bars.add_task(safe(title), total=total, text="")

    def step(self, text: str = "") -> None:
        """Moves the bar; a block's summary stays on the screen."""
        self.done += 1
        if text:
            self._line(f"[{self.done}/{self.total}] {text}{self._eta()}", always=False)
        if self.live:
            self.bars.advance(self.bars.task_ids[-1])

    def detail(self, text: str) -> None:
        """Shows what is being worked on, beside the bar."""
        if self.live:
            self.bars.update(self.bars.task_ids[-1], text=safe(text))

    def notice(self, text: str) -> None:
        """A line that stays."""
        self._line(f"note: {text}", always=True)

    def line(self, text: str) -> None:
        """A line that stays, as it is."""
        self._line(text, always=True)

    def _eta(self) -> str:
        left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        return f"  ETA {left:.0f} s" if left >= 1 and not self.live else ""

    def _line(self, text: str, always: bool) -> None:
        """Plain lines are thinned out, so that a log of a long run stays readable; the last one is always there."""
        now = time.monotonic()
        due = always or self.live or self.done == self.total or now - self.said >= PLAIN_SECONDS or self.done == 1
        if not self.quiet and due:
            err.print(safe(text))
            self.said = now
