"""Caution with what others made: links out of a directory, JSON of no sane size, names given twice, or impossible."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from obsprune.errors import InputError

MOST_JSON = 2**26
"""Bytes of a JSON file. The index of the largest models has a tenth of that."""


def refuse_links(directory: Path, patterns: Iterable[str]) -> None:
    """Raises InputError when a file of the directory that matches is a link to somewhere else.

    What is read is copied into the result, and a result is published: a link may lead to anything the user can read.
    The cache of the Hugging Face hub is made of links (snapshots/REVISION/FILE to blobs/HASH): these are its own.
    """
    home = directory.resolve()
    homes = [home, home.parent.parent / "blobs"] if _is_snapshot(home) else [home]
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern)}):
        real = path.resolve()
        if not any(real.is_relative_to(one) for one in homes):
            raise InputError(
                f"{path} is a link to {real}, outside the checkpoint's directory; put the file itself there, or name "
                "the directory that holds it"
            )


def _is_snapshot(directory: Path) -> bool:
    return directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")


def read_json(path: Path) -> Any:
    """The values of a JSON file. Raises InputError when it is damaged, or larger than any such file."""
    try:
        return json_values(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); download it again") from error


def json_values(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """As `read_json`, with ValueError or OSError. pairs: what makes its objects (as in json.loads)."""
    size = path.stat().st_size
    if size > MOST_JSON:
        raise ValueError(f"it has {size:,} bytes, and no such file has so many")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_file(path: Path) -> bool:
    """Whether there is such a file; under a name that is too long, or has a zero in it, there is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: Path) -> bool:
    """As `is_file`, for directories."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values. Raises ValueError for a name that is there twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {next(name for name in made if names.count(name) > 1)!r} twice")
    return made
