"""The classes of a data set in a model's own numbers, and the labels file that names them image by image."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from obsprune.errors import InputError
from obsprune.models.caution import is_file

NUMBER = re.compile(r"[+-]?[0-9]+")
WORDNET = re.compile(r"n[0-9]{8}")
BACKGROUND = "background"
SEPARATORS = {".tsv": "\t", ".csv": ",", ".txt": None}
"""Of a labels file, by its suffix; None: white space."""
PATH_HEADERS = ("path", "file", "file_name", "filename", "image", "image_path")
CLASS_HEADERS = ("class", "label", "labels", "target", "class_index", "class_id", "wnid", "synset")


class UnknownClass(InputError):
    """A class that the model does not know, called `value` by the data set."""

    def __init__(self, value: str, message: str) -> None:
        super().__init__(message)
        self.value = value


@dataclass(frozen=True)
class Found:
    """The model's index for each class of a data set; rule: how they were found."""

    indices: dict[str, int]
    rule: str


@dataclass(frozen=True)
class Labels:
    """The classes of the model with this `config`, as data sets name them.

    A number counts the data set's classes from 0. Where the model's class 0 is called `background`, data sets do not
    count it (ImageNet's 1,000 classes for a model of 1,001): numbers are shifted by `offset` = 1, and the last number
    of the model's own counting raises, since no file that holds it can mean the shifted one.

    A text is a label of the config as it stands; else, whatever its case and with `_` for a space, a label or one of a
    label's synonyms (separated by commas). A text that fits several classes raises. label2id is not asked: of two
    classes of one name (ImageNet's cranes) it knows only the last.
    """

    config: Any = field(repr=False)

    @cached_property
    def names(self) -> dict[int, str]:
        """The model's index → its label."""
        return {int(index): str(name) for index, name in self.config.id2label.items()}

    @cached_property
    def offset(self) -> int:
        """What is added to a data set's class number: 1 where the model's first class is `background`, else 0."""
        return int(self.names.get(0, "").strip().lower() == BACKGROUND)

    @property
    def count(self) -> int:
        """Classes a data set can have: the model's own but for `background`."""
        return int(self.config.num_labels) - self.offset

    def index(self, value: str | int) -> int:
        """The model's index for a class number or name. Raises UnknownClass, an InputError."""
        text = str(value).strip()
        return self._numbered(text) if NUMBER.fullmatch(text) else self._named(text)

    def resolve(self, names: Iterable[str]) -> Found:
        """The model's indices for all class names of a data set, each by `index`; and where they are as many WordNet
        numbers (n01440764) as the model has classes of other names, by their sorted order, as ImageNet counts them.

        Raises UnknownClass for the first that is not known.
        """
        names = list(dict.fromkeys(names))
        if self._all_of_imagenet(names):
            return Found(self._by_place(sorted(names)), "the sorted order of the WordNet numbers")
        indices = {name: self.index(name) for name in names}
        return Found(indices, "class numbers" if all(map(NUMBER.fullmatch, names)) else "class names")

    def resolve_ordered(self, names: Sequence[str]) -> Found:
        """As `resolve`, for names that a data set numbers itself: where a name is not known, as many classes as the
        model has are the model's in the same order, unless another name is known to stand elsewhere.
        """
        try:
            return self.resolve(names)
        except UnknownClass:
            placed = self._by_place(names)
            if len(names) != self.count or any(self._known(name) not in (None, placed[name]) for name in names):
                raise
            return Found(placed, "the order of the data set's classes")

    def _by_place(self, names: Sequence[str]) -> dict[str, int]:
        return {name: place + self.offset for place, name in enumerate(names)}

    def _all_of_imagenet(self, names: Sequence[str]) -> bool:
        own = any(map(WORDNET.search, self.names.values()))
        return not own and len(names) == self.count and all(map(WORDNET.fullmatch, names))

    def _known(self, name: str) -> int | None:
        try:
            return self.index(name)
        except UnknownClass:
            return None

    def _numbered(self, text: str) -> int:
        number = int(text)
        if not 0 <= number < self.count:
            shifted = f", not counting its class 0, {BACKGROUND}" if self.offset else ""
            raise UnknownClass(
                text,
                f"class {number} is none of the model's {self.count:,} classes, "
                f"whose numbers are 0 to {self.count - 1}{shifted}",
            )
        return number + self.offset

    def _named(self, text: str) -> int:
        found = self._exact.get(text) or self._synonyms.get(_plain(text)) or []
        if not found:
            raise UnknownClass(text, self._unknown(text))
        if len(found) > 1:
            several = " or ".join(f"{index - self.offset} ({self.names[index]})" for index in found)
            raise UnknownClass(text, f"class '{text}' is ambiguous, it may be {several}; give the number")
        return found[0]

    def _unknown(self, text: str) -> str:
        last = self.count - 1
        if WORDNET.fullmatch(text):
            return (
                f"class '{text}' is a WordNet number, and the model names its {self.count:,} classes otherwise; give a "
                f"labels file with a path and a class number (0 to {last}) on each line, or all {self.count:,} classes"
            )
        close = difflib.get_close_matches(_plain(text), self._synonyms, n=2, cutoff=0.75)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        return (
            f"class '{text}' is none of the model's {self.count:,} classes{hint}; give a labels file with a path and a "
            f"class on each line, its number (0 to {last}) or its label in the model's config"
        )

    @cached_property
    def _exact(self) -> dict[str, list[int]]:
        return _inverted({index: [name] for index, name in self.names.items()})

    @cached_property
    def _synonyms(self) -> dict[str, list[int]]:
        return _inverted({index: map(_plain, _synonyms(name)) for index, name in self.names.items()})


def _synonyms(name: str) -> list[str]:
    return [name, *name.split(","), *WORDNET.findall(name)]


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())


def _inverted(names: dict[int, Iterable[str]]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for index, several in names.items():
        for name in dict.fromkeys(several):
            places.setdefault(name, []).append(index)
    return places


@dataclass(frozen=True)
class Row:
    """A line of a labels file: its number, the image's path, the class as it is written."""

    line: int
    path: str
    value: str


def read_labels(path: Path, labels: Labels) -> tuple[list[Row], Found]:
    """The rows of a labels file and the model's index for each class in it: columns path and class, tabs in .tsv,
    commas in .csv, white space in .txt; paths from the file's folder; a header may name the two columns.

    Raises InputError, which tells the line, for a missing column, a missing image and an unknown class.
    """
    rows = list(_rows(path))
    missing = [row for row in rows if not is_file(path.parent / row.path)]
    if missing:
        raise InputError(
            f"{path} line {missing[0].line} names the image {missing[0].path}, which is not there ({len(missing):,} of "
            f"{len(rows):,} are missing); a labels file has a path, from its own folder, and a class on each line"
        )
    try:
        return rows, labels.resolve(row.value for row in rows)
    except UnknownClass as error:
        line = next(row.line for row in rows if row.value == error.value)
        raise InputError(f"{path} line {line}: {error}") from error


def _rows(path: Path) -> Iterator[Row]:
    lines = iter(_lines(path))
    first = next(lines, None)
    if first is None:
        raise InputError(f"{path} is empty; a labels file has a path and a class on each line")
    columns = _columns(path, first[1])
    if columns is None:
        yield _row(path, *first, (0, 1))
    for line, cells in lines:
        yield _row(path, line, cells, columns or (0, 1))


def _row(path: Path, line: int, cells: list[str], columns: tuple[int, int]) -> Row:
    if len(cells) <= max(columns):
        raise InputError(
            f"{path} line {line} has {len(cells)} column{'s' * (len(cells) != 1)}; a labels file has a path and a "
            "class on each line, with a tab between them in .tsv, a comma in .csv, white space in .txt"
        )
    return Row(line, cells[columns[0]], cells[columns[1]])


def _columns(path: Path, first: list[str]) -> tuple[int, int] | None:
    """Where a header says that path and class are; None where the first line is no header."""
    names = [cell.lower() for cell in first]
    places = [place for place, name in enumerate(names) if name in PATH_HEADERS]
    if not places:
        return None
    classes = [names.index(name) for name in CLASS_HEADERS if name in names]
    if not classes:
        raise InputError(f"{path} has the columns {', '.join(first)}; call the one with the class {CLASS_HEADERS[0]}")
    return places[0], classes[0]


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and cells; blank lines are left out."""
    separator = SEPARATORS[path.suffix.lower()]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets write a mark before the text
            return [(line, cells) for line, cells in _split(file, separator) if any(cells)]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"{path} cannot be read as a labels file: {error}") from error


def _split(file: TextIO, separator: str | None) -> Iterator[tuple[int, list[str]]]:
    if separator is None:
        yield from enumerate(map(str.split, file), start=1)
        return
    quotes = separator == ","
    reader = csv.reader(file, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE)
    for cells in reader:
        yield reader.line_num, [cell.strip() for cell in cells]
