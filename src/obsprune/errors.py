"""Every error a person can meet. Each message tells the fact, the values, and the way out."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
NAMES = "token|secret|passw|signature|credential|key|policy|auth"
SECRETS = {
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"): "hf_***",
    re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s]*@"): r"\1***@",
    re.compile(r"(?<![\w/:])[\w.+-]+:[^/\s:@]+@(?=[\w-])"): "***@",
    re.compile(rf"([?&;#](?:[\w.%-]*(?:{NAMES})[\w.%-]*|sig)=)[^&;#\s'\"]+", re.IGNORECASE): r"\1***",
    re.compile(r"(\bauthorization\W{1,4}(?:\w+\s+)?|\bbearer\s+)[^\s'\",;]{8,}", re.IGNORECASE): r"\1***",
}
"""What hides in a text: access tokens, passwords in URLs, values of a query, headers of a request."""


class ObspruneError(Exception):
    """The root of all errors raised on purpose; `cli/console.py` turns them into one line.

    shared: it is raised in all processes of a run alike, and the first one tells it.
    """

    shared = False


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

    def __reduce__(self) -> tuple[type[NotPositiveDefinite], tuple[str, int, int, float]]:
        return NotPositiveDefinite, (self.name, self.count, self.columns, self.damping)  # to another process, whole


def nearest(word: str, known: Iterable[str]) -> str:
    """The sentence that helps after an unknown `word`: the closest of the `known` ones, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What another library's error says first, redacted, and the reason where that is on the next line; its kind when
    it says nothing.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return redacted(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])


def redacted(text: str) -> str:
    """A text without the tokens and passwords that are in it: for logs, reports and screens."""
    for variable in SECRET_VARIABLES:
        secret = os.environ.get(variable, "").strip()
        text = text.replace(secret, "***") if len(secret) >= 8 else text
    for pattern, instead in SECRETS.items():
        text = pattern.sub(instead, text)
    return text


def printable(text: str) -> str:
    """A text as one line for a terminal: redacted, and what would steer the terminal (names can hold it) spelt out."""
    return "".join(map(_spelt, redacted(text)))


def _spelt(char: str) -> str:
    """Controls, formats such as a change of direction, halves of pairs, line ends: as Python writes them."""
    return ascii(char)[1:-1] if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char
