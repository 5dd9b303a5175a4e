"""What others may read of a result: no place on this machine, which may hold a person's or a project's name."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ENDS = r"\s'\"`()\[\]{}<>,;|"
"""What no path in a sentence goes on after."""
ABSOLUTE = re.compile(rf"(?:(?<=[{ENDS}=:])|^)(?:~[\w.-]*)?/(?![/{ENDS}])[^{ENDS}]*")
"""A path in a sentence, from the root or a home; not what comes after `https:`."""
NAMED = re.compile(r"([\w.:-]*=)?((?:~[\w.-]*)?/.+)", re.DOTALL)
"""A value that is a path, or KEY=PATH."""
CLAUSES = re.compile(r"[,:;] ")
"""In what is no such value, but a sentence that begins with a path."""
PLACES = {"source", "name", "dataset", "teacher", "output", "evaluation"}
"""Under which keys of a report or recipe a path may be."""


def pathless(text: str) -> str:
    """A text with the last part alone of each absolute path in it; relative paths stay."""
    text = text.replace("file://", "")
    whole = NAMED.fullmatch(text)
    if whole and not CLAUSES.search(text):
        return (whole[1] or "") + _last(whole[2])
    for known in {str(Path.home()), str(Path.cwd())} - {os.sep}:  # they may have spaces in them
        text = re.sub(rf"{re.escape(known)}(?=/|[{ENDS}:]|\Z)", "~", text)
    return ABSOLUTE.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or "/"


def pathless_command(line: str) -> str:
    """The same of a command line, word by word."""
    try:
        return shlex.join(map(pathless, shlex.split(line)))
    except ValueError:  # a quotation mark without its other
        return pathless(line)


def pathless_tree(tree: Any) -> Any:
    """The same of all texts in nested plain values, and of their keys."""
    return _changed(without_known(tree), pathless)


def without_known(tree: Any) -> Any:
    """A report or recipe in whose texts each path that it names itself has its last part alone, whatever is in it: in a
    sentence nobody else can tell where a path with a space ends.
    """
    paths = {path for text in _told(tree) for path in _odd(text)}
    if not paths:
        return tree
    known = "|".join(map(re.escape, sorted(paths, key=lambda path: (-len(path), path))))
    pattern = re.compile(rf"(?:{known})(?:/[^{ENDS}]*)?")
    return _changed(tree, lambda text: pattern.sub(lambda found: _last(found[0]), text))


def _told(tree: Any, key: str = "") -> Iterator[str]:
    """The texts in nested plain values under the keys that may hold a path."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _told(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _told(value, key)
    elif isinstance(tree, str) and key in PLACES:
        yield tree


def _odd(text: str) -> Iterator[str]:
    """A value's path and its folders, those that a sentence would cut off."""
    whole = NAMED.fullmatch(text)
    given = whole[2].rstrip("/") if whole else ""
    for path in {given, re.sub(r"^~(?=/)", lambda _: str(Path.home()), given)}:
        parts = [path, re.sub(r":[^/]*$", "", path), *map(str, Path(path).parents)]
        yield from (part for part in parts if re.search(f"[{ENDS}]", part))


def _changed(tree: Any, change: Callable[[str], str]) -> Any:
    """Nested plain values with other texts, keys too."""
    if isinstance(tree, dict):
        return {_changed(key, change): _changed(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_changed(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
