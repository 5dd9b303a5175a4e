"""What can be evaluated: a task names a corpus and says how rows are cut from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from obsprune.errors import InputError, nearest
from obsprune.evaluate.perplexity import perplexity
from obsprune.models.data import check_vocabulary, content_hash, open_corpus
from obsprune.models.load import Model
from obsprune.progress import Progress

NAMED = {
    "wikitext2": "test split, lines joined by a blank line",
    "c4": "first test shard, 1,100 documents joined by a space",
}
TASKS = ("heldout", "text=PATH", *NAMED)
C4_ROWS = 256
"""Rows of the published C4 protocol."""


@dataclass(frozen=True)
class Task:
    """Rows of token ids [n, seqlen] under a name, with the protocol they were cut by."""

    name: str
    rows: Tensor
    protocol: dict[str, Any]

    def score(self, model: Model, progress: Progress, who: str) -> dict[str, Any]:
        """Perplexity with its whole protocol."""
        return {**perplexity(model, self.rows, progress, f"{self.name}, {who}"), **self.protocol}


def check_name(text: str) -> None:
    """Raises InputError for a task nobody knows."""
    if text not in ("heldout", *NAMED) and not (text.startswith("text=") and len(text) > 5):
        raise InputError(f"unknown task '{text}'; {nearest(text, TASKS)}")


def text_task(text: str, model: Model, seqlen: int, limit: int | None = None) -> Task:
    """`wikitext2`, `c4` or `text=PATH`: all rows of the corpus in order (the first `limit`). Raises InputError."""
    check_name(text)
    corpus = open_corpus(text.removeprefix("text="), split="test")
    rows, joined = corpus.every_row(lambda: model.tokenizer, seqlen)
    return rows_task(text, rows[: C4_ROWS if text == "c4" else None], NAMED.get(text, joined), model, limit)


def rows_task(name: str, rows: Tensor, joined: str, model: Model, limit: int | None = None) -> Task:
    """A task from rows that are already cut. Raises InputError when there are none, or ids are not the model's."""
    rows = rows[:limit]
    if not rows.numel() or rows.shape[1] < 2:
        raise InputError(f"task {name}: the text is shorter than one row; give more text or a smaller --seqlen")
    check_vocabulary(rows, model.vocabulary, name)
    protocol = {
        "corpus": name.removeprefix("text="),
        "join": joined,
        "seqlen": rows.shape[1],
        "stride": rows.shape[1],
        "sequences": len(rows),
        "tokens": rows.numel(),
        "first_token": int(rows[0, 0]),
        "sha256": content_hash(rows),
    }
    return Task(name, rows, protocol)
