"""Tokens to calibrate and to evaluate on: documents, which the model's tokenizer turns into one stream cut in rows, or
rows of token ids as they are.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from obsprune.errors import InputError, first_line
from obsprune.models.samples import Batch, Samples, Source

BATCH_TOKENS = 8192
"""Tokens of one calibration batch when its size is `auto`."""


@final
@dataclass(frozen=True)
class TokenSamples(Samples):
    """Rows of token ids [n, seqlen]."""

    ids: Tensor
    unit = "sequences"

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> TokenSamples:
        return TokenSamples(self.ids[list(indices)])

    def batches(self, size: int, device: torch.device) -> list[Batch]:
        return [{"input_ids": part.to(device)} for part in torch.split(self.ids, size)]

    def content_hash(self) -> str:
        return hashlib.sha256(self.ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        return {"sequences": len(self.ids), "seqlen": self.positions, "tokens": self.ids.numel()}

    @property
    def noun(self) -> str:
        return f"sequences of {self.positions} tokens"

    @property
    def remedy(self) -> str:
        return "use more text, a smaller --nsamples or a shorter --seqlen"

    @property
    def positions(self) -> int:
        return self.ids.shape[1]

    @property
    def together(self) -> int:
        return max(1, BATCH_TOKENS // self.positions)


class Corpus(Source):
    """Something rows of token ids can be cut from. seqlen: tokens asked for in a row; vocabulary: how many ids there
    are.
    """

    name: str
    seqlen: int
    vocabulary: int

    @abstractmethod
    def shuffled(self, needed: int, generator: torch.Generator, more: int = 0) -> Tensor:
        """Rows [n, seqlen] as `sample` promises them."""

    @abstractmethod
    def in_order(self) -> Tensor:
        """All rows in their order, each starting where the last ended."""

    @property
    @abstractmethod
    def joined(self) -> str:
        """The rule by which documents were joined."""

    def sample(self, needed: int, generator: torch.Generator, more: int = 0) -> TokenSamples:
        rows = self.shuffled(needed, generator, more)
        check_vocabulary(rows, self.vocabulary, self.name)
        return TokenSamples(rows)

    def every(self) -> TokenSamples:
        """All rows in their order. Raises InputError when there are none, or ids are not the model's."""
        rows = self.in_order()
        if not rows.numel() or rows.shape[1] < 2:
            raise InputError(f"{self.name}: the text is shorter than one row; give more text or a smaller --seqlen")
        check_vocabulary(rows, self.vocabulary, self.name)
        return TokenSamples(rows)


@final
@dataclass(frozen=True)
class Documents(Corpus):
    """Texts; each is tokenised by itself, with the beginning-of-text token where the tokenizer adds one."""

    name: str
    texts: Sequence[str]
    tokenizer: Callable[[], Any]
    seqlen: int
    vocabulary: int

    def shuffled(self, needed: int, generator: torch.Generator, more: int = 0) -> Tensor:
        """Documents in random order until there are enough tokens, cut into rows, the rows in random order."""
        order = torch.randperm(len(self.texts), generator=generator).tolist()
        first = self._cut((self.texts[index] for index in order), needed)
        rows = first[torch.randperm(len(first), generator=generator)]
        if not more:
            return rows
        others = self._cut((self.texts[index] for index in order), needed + more)[len(first) :]
        return torch.cat([rows, others[torch.randperm(len(others), generator=generator)]])

    def in_order(self) -> Tensor:
        return self._cut(self.texts, None)

    def _cut(self, texts: Iterable[str], rows: int | None) -> Tensor:
        tokenizer, enough = self.tokenizer(), None if rows is None else rows * self.seqlen
        try:
            stream = tokenise(tokenizer, texts, enough)
        except Exception as error:  # both are looked at only now: a table's cells, a tokenizer's settings
            raise InputError(
                f"{self.name} cannot be read, or not turned into tokens ({first_line(error)}); mend it or the model's "
                "tokenizer, or give token ids: --dataset FILE.safetensors"
            ) from error
        return cut(stream, self.seqlen)

    @property
    def joined(self) -> str:
        return "one document" if len(self.texts) == 1 else f"{len(self.texts)} documents, each tokenised by itself"

    def notices(self) -> list[str]:
        return []


@final
@dataclass(frozen=True)
class TokenRows(Corpus):
    """Rows of token ids [n, width] as a file has them."""

    name: str
    ids: Tensor
    seqlen: int
    vocabulary: int

    def shuffled(self, needed: int, generator: torch.Generator, more: int = 0) -> Tensor:
        return self.in_order()[torch.randperm(len(self.ids), generator=generator)]

    def in_order(self) -> Tensor:
        return self.ids[:, : self.seqlen]

    @property
    def joined(self) -> str:
        return "rows of token ids, as the file has them"

    def notices(self) -> list[str]:
        width = self.ids.shape[1]
        return (
            [f"the sequences of {self.name} are {width} tokens long, not {self.seqlen}"] if width < self.seqlen else []
        )


def tokenise(tokenizer: Any, texts: Any, enough: int | None) -> list[int]:
    """One stream of ids; stops after the document that makes it `enough` long."""
    stream: list[int] = []
    for text in texts:
        if isinstance(text, str) and text.strip():  # tables have gaps
            stream += tokenizer(text, verbose=False)["input_ids"]
        if enough is not None and len(stream) >= enough:
            break
    return stream


def cut(ids: Sequence[int], seqlen: int) -> Tensor:
    """Non-overlapping rows [n, seqlen]; the tail is dropped."""
    count = len(ids) // seqlen
    return torch.tensor(ids[: count * seqlen], dtype=torch.long).view(count, seqlen)


def check_vocabulary(rows: Tensor, vocabulary: int, source: str) -> None:
    """Raises InputError when an id is not one of the model's."""
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < vocabulary:
        raise InputError(
            f"{source} holds token ids {int(rows.min())}…{int(rows.max())} and the model knows 0…{vocabulary - 1}; "
            "tokenise it with this model's tokenizer"
        )
