"""What a page is made of, as plain values: sections, and in them facts, tables, notes, code and figures.

Each part is written twice: as HTML by the macro of its name in templates/parts.html.j2, and as Markdown by itself.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from obsprune.errors import printable
from obsprune.report.drawings import Drawing
from obsprune.report.markdown import fenced, md, table

SHORT = 8
"""Characters that a secret has at least."""


@final
@dataclass(frozen=True)
class Marked:
    """A cell that is to be seen among others. mark: `best`, `differs` or `wrong`; an empty one marks nothing."""

    text: str
    mark: str = "best"


Cell = str | Marked


def marked(cell: Cell) -> Marked:
    """Any cell with its mark."""
    return cell if isinstance(cell, Marked) else Marked(cell, "")


class Part(ABC):
    """One thing in a section. macro: what writes it as HTML."""

    macro: ClassVar[str]

    @abstractmethod
    def markdown(self) -> Iterator[str]:
        """Its lines in report.md; none where a terminal has no use for it."""


@final
@dataclass(frozen=True)
class Sentence(Part):
    """A paragraph."""

    macro: ClassVar[str] = "sentence"
    text: str

    def markdown(self) -> Iterator[str]:
        yield md(self.text)


@final
@dataclass(frozen=True)
class Facts(Part):
    """Names and what belongs to them."""

    macro: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, Cell]]

    @property
    def cells(self) -> list[tuple[str, Marked]]:
        return [(name, marked(cell)) for name, cell in self.rows]

    def markdown(self) -> Iterator[str]:
        yield from table(["", ""], [(md(name), _strong(value)) for name, value in self.rows])


@final
@dataclass(frozen=True)
class Tiles(Part):
    """The few numbers that are looked at first: (what it is, the number, what belongs to it)."""

    macro: ClassVar[str] = "tiles"
    tiles: Sequence[tuple[str, str, str]]

    def markdown(self) -> Iterator[str]:
        yield from table(["", "", ""], [(md(name), f"**{md(value)}**", md(more)) for name, value, more in self.tiles])


@final
@dataclass(frozen=True)
class Table(Part):
    """Rows under a head. left: so many of the first columns are words, the others numbers; folded: it is long, and
    shown when asked for; report.md leaves it out then. caption: what it is.
    """

    macro: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1
    folded: bool = False

    @property
    def cells(self) -> list[list[Marked]]:
        return [[marked(cell) for cell in row] for row in self.rows]

    def markdown(self) -> Iterator[str]:
        if not self.folded:
            yield f"{md(self.caption)}:"
            yield ""
            yield from table([md(name) for name in self.head], [[_strong(cell) for cell in row] for row in self.rows])


@final
@dataclass(frozen=True)
class Notes(Part):
    """Sentences below each other."""

    macro: ClassVar[str] = "notes"
    notes: Sequence[str]

    def markdown(self) -> Iterator[str]:
        yield from (f"- {md(note)}" for note in self.notes)


@final
@dataclass(frozen=True)
class Code(Part):
    """Lines to be copied. language: as Markdown calls it; folded: as of a table."""

    macro: ClassVar[str] = "code"
    caption: str
    text: str
    language: str = "text"
    folded: bool = False

    def markdown(self) -> Iterator[str]:
        if not self.folded:
            yield f"{md(self.caption)}:"
            yield ""
            yield from fenced(self.language, clean(self.text).rstrip("\n").split("\n"))


@final
@dataclass(frozen=True)
class Figures(Part):
    """Drawings side by side where there is room; the tables beside them have their numbers."""

    macro: ClassVar[str] = "figures"
    drawings: Sequence[Drawing]

    def markdown(self) -> Iterator[str]:
        yield from ()


@final
@dataclass(frozen=True)
class Section:
    """name: of its address in the page, in plain letters."""

    name: str
    title: str
    parts: Sequence[Part] = field(default_factory=tuple)


def clean(text: str) -> str:
    """A text of several lines, each as `printable` makes it."""
    if len(text) < SHORT and text.isascii() and text.isprintable() and ":" not in text:
        return text  # as all numbers are, of which there are thousands
    return "\n".join(map(printable, text.split("\n")))


def markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A page in Markdown."""
    lines = [f"# {md(title)}", "", md(lead)]
    for section in sections:
        told = ["\n".join(part.markdown()) for part in section.parts]
        lines += ["", f"## {md(section.title)}", *(line for text in told if text for line in ("", text))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _strong(cell: Cell) -> str:
    """A marked cell is bold."""
    one = marked(cell)
    text = md(one.text)
    return f"**{text}**" if one.mark and text else text
