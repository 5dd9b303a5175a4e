"""Text that is no markup, in Markdown: names come from models and data sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from obsprune.errors import printable
from obsprune.report.pathless import pathless

MARKUP = re.compile(r"[\\`*_\[\]<>|~&$@]|^[-+#=]|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What Markdown, HTML or a table would take for its own; bare addresses would become links."""
LONGEST = 300
"""Characters of a name or note."""


def md(value: Any) -> str:
    """Any text as text of Markdown, on one line and without a place on this machine."""
    text = pathless(printable(str(value)))
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return MARKUP.sub(lambda found: f"\\{found[0]}", text)


def fenced(language: str, lines: Sequence[str]) -> list[str]:
    """A block of code, between more backticks than a line of it begins with."""
    held = [line.lstrip() for line in lines]
    fence = "`" * max([3, *(1 + len(line) - len(line.lstrip("`")) for line in held)])
    return [f"{fence}{language}", *lines, fence]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Cells that are Markdown already."""
    names = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]
