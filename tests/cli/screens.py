"""What a person sees: the bytes that go to a terminal, as the terminal shows them; and screens kept as text files.

    OBSPRUNE_RENEW_SNAPSHOTS=1 pytest tests/cli/test_terminal.py

writes tests/cli/snapshots/ anew; look at the difference before it is committed.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pyte
import pytest
from rich.console import Console

SNAPSHOTS = Path(__file__).parent / "snapshots"
RENEW = "OBSPRUNE_RENEW_SNAPSHOTS"
LINES = 200
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|9[0-7]|4[0-8])[0-9;]*m")


@dataclass
class Terminal:
    """A terminal of so many columns, or a file. environment: variables that say how to write."""

    columns: int = 80
    is_terminal: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    written: io.StringIO = field(default_factory=io.StringIO)

    def console(self) -> Console:
        known = {"TERM": "xterm-256color", "COLORTERM": "truecolor", **self.environment}
        return Console(
            file=self.written, force_terminal=self.is_terminal, width=self.columns, height=40, highlight=False,
            soft_wrap=True, _environ=known,
        )  # fmt: skip

    def screen(self) -> str:
        """What is to be seen now, with all that has left the screen at its top; of a file, what is in it."""
        if not self.is_terminal:
            return self.written.getvalue()
        screen = pyte.Screen(self.columns, LINES)
        pyte.Stream(screen).feed(self.written.getvalue().replace("\n", "\r\n"))
        return "\n".join(line.rstrip() for line in screen.display).rstrip() + "\n"

    @property
    def coloured(self) -> bool:
        return bool(COLOUR.search(self.written.getvalue()))

    @property
    def moved(self) -> bool:
        """Whether a cursor has gone back to write over something."""
        return bool(re.search(r"\x1b\[\d*[ABCDGHJK]", self.written.getvalue()))


def measured(text: str) -> str:
    """Without what depends on the machine: numbers with a point, times and the worst matrix are #, and columns stand
    apart by two spaces.
    """
    numbers = re.sub(r"\d+:\d\d:\d\d|\d+\.\d+(e[-+]\d+)?|\d+e[-+]\d+|(?<=\()\w+_proj(?=\))", "#", text)
    return re.sub(r" {2,}", "  ", numbers)


def same_as_kept(name: str, text: str) -> None:
    """Holds a text against the kept one, or keeps it."""
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get(RENEW):
        path.write_text(text)
    if not path.is_file():
        pytest.fail(f"{path} is not there; {RENEW}=1 writes it")
    assert text == path.read_text(), f"{name} looks otherwise; see {Path(__file__).name}"
