"""What others may read of a result: no place on this machine, which may hold a person's or a project's name."""

from __future__ import annotations

import os
import re
import shlex
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
    if isinstance(tree, dict):
        return {pathless_tree(key): pathless_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [pathless_tree(value) for value in tree]
    return pathless(tree) if isinstance(tree, str) else tree
