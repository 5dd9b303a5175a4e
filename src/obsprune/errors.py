"""Every error a person can meet. Each message tells the fact, the values, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ObspruneError(Exception):
    """The root of all errors raised on purpose; `cli/console.py` turns them into one line."""


class InputError(ObspruneError):
    """Something the user gave (a flag, a file, a model, a data set) cannot be used; they can mend it."""


class OutputError(ObspruneError):
    """The result could not be written: a full disk, no permission. What was committed stays."""


class WalkMismatch(ObspruneError):
    """The block-by-block walk does not reproduce the model's own forward; pruning would be wrong."""


class NotPositiveDefinite(ObspruneError):
    """A Gram matrix could not be factorised, at any damping of the ladder, in float32 or float64."""

    def __init__(self, name: str, count: int, columns: int, damping: float) -> None:
        super().__init__(
            f"the Gram matrix of {name} ({columns} columns, {count} tokens) is not positive definite even with "
            f"damping {damping:g}; use more calibration data (--nsamples) or raise --set solver.damping"
        )
        self.name, self.count, self.columns, self.damping = name, count, columns, damping


def nearest(word: str, known: Iterable[str]) -> str:
    """The sentence that helps after an unknown `word`: the closest of the `known` ones, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What another library's error says first; its kind when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
