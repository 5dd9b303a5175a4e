"""Tokens to calibrate and to evaluate on: named corpora, text files, ready token ids; drawn with a seed, hashed.

A corpus is either documents, which the model's tokenizer turns into one stream cut in rows, or rows of token ids.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from obsprune.errors import InputError, nearest
from obsprune.models.checkpoint import read_headers, read_tensors

SEPARATOR = "<|endoftext|>"
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}


@dataclass(frozen=True)
class Draw:
    """Calibration and held-out rows of token ids [n, seqlen], disjoint, with what a report says about them.

    further: the rows of the second and every later round, as many each as `calibration`.
    """

    calibration: Tensor
    heldout: Tensor
    further: list[Tensor]
    facts: dict[str, Any]


class Corpus(ABC):
    """Something rows of token ids can be cut from. `source` is what the user called it."""

    source: str

    @abstractmethod
    def rows(
        self, tokenizer: Callable[[], Any], seqlen: int, needed: int, generator: torch.Generator, more: int = 0
    ) -> Tensor:
        """At least `needed` rows [n, seqlen] in random order, or all there are; then `more` others, if there are.

        The first `needed` rows do not depend on `more`.
        """

    @abstractmethod
    def every_row(self, tokenizer: Callable[[], Any], seqlen: int) -> tuple[Tensor, str]:
        """All rows in their order, each starting where the last ended, and the rule by which documents were joined."""


@final
@dataclass(frozen=True)
class Documents(Corpus):
    """Texts; each is tokenised by itself, with the beginning-of-text token where the tokenizer adds one."""

    source: str
    texts: Sequence[str]

    def rows(
        self, tokenizer: Callable[[], Any], seqlen: int, needed: int, generator: torch.Generator, more: int = 0
    ) -> Tensor:
        """Documents in random order until there are enough tokens, cut into rows, the rows in random order."""
        order = torch.randperm(len(self.texts), generator=generator).tolist()
        first = cut(tokenise(tokenizer(), (self.texts[index] for index in order), needed * seqlen), seqlen)
        rows = first[torch.randperm(len(first), generator=generator)]
        if not more:
            return rows
        stream = tokenise(tokenizer(), (self.texts[index] for index in order), (needed + more) * seqlen)
        others = cut(stream, seqlen)[len(first) :]
        return torch.cat([rows, others[torch.randperm(len(others), generator=generator)]])

    def every_row(self, tokenizer: Callable[[], Any], seqlen: int) -> tuple[Tensor, str]:
        joined = "one document" if len(self.texts) == 1 else f"{len(self.texts)} documents, each tokenised by itself"
        return cut(tokenise(tokenizer(), self.texts, None), seqlen), joined


@final
@dataclass(frozen=True)
class TokenRows(Corpus):
    """Rows of token ids [n, width] as a file has them."""

    source: str
    ids: Tensor

    def rows(
        self, tokenizer: Callable[[], Any], seqlen: int, needed: int, generator: torch.Generator, more: int = 0
    ) -> Tensor:
        return self.ids[torch.randperm(len(self.ids), generator=generator), :seqlen]

    def every_row(self, tokenizer: Callable[[], Any], seqlen: int) -> tuple[Tensor, str]:
        return self.ids[:, :seqlen], "rows of token ids, as the file has them"


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


def open_corpus(source: str, text_column: str | None = None, split: str = "train") -> Corpus:
    """`wikitext2`, `c4`, or a path: .txt, .jsonl, .json, .csv, .parquet, FILE.safetensors[:TENSOR].

    Raises InputError when it is unknown, missing, empty, or of another form.
    """
    if source in NAMED:
        return Documents(source, NAMED[source](split))
    name, _, tensor = source.partition(".safetensors")
    path = Path(f"{name}.safetensors" if tensor or source.endswith(".safetensors") else source).expanduser()
    if not path.is_file():
        _refuse(source, path)
    if path.suffix == ".safetensors":
        return TokenRows(source, read_token_rows(path, tensor.removeprefix(":") or "input_ids"))
    texts = read_text(path) if path.suffix == ".txt" else read_table(path, text_column)
    if not len(texts):
        raise InputError(f"{source} is empty: it holds no text")
    return Documents(source, texts)


def _refuse(source: str, path: Path) -> None:
    if path.is_dir():
        raise InputError(
            f"{source} is a directory; give a file of it (.txt, .jsonl, .json, .csv, .parquet, .safetensors)"
        )
    if path.suffix or "/" in source:
        raise InputError(f"there is no file {source}")
    raise InputError(f"unknown dataset '{source}'; {nearest(source, NAMED)}, or a path")


def read_text(path: Path) -> list[str]:
    """The documents of a text file, separated by lines `<|endoftext|>`; without such lines, the whole file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    parts = [part.strip() for part in f"\n{text}\n".split(f"\n{SEPARATOR}\n")]
    return [text] if len(parts) == 1 and parts[0] else [part for part in parts if part]


def read_table(path: Path, text_column: str | None) -> Sequence[str]:
    """The text column of a JSON, CSV or Parquet file, read as it is asked for."""
    kind = LOADERS.get(path.suffix)
    if kind is None:
        raise InputError(f"{path}: unknown kind of file; known: .txt, .safetensors, {', '.join(LOADERS)}")
    return _text_column(path, kind, text_column) if path.stat().st_size else []


def _text_column(path: Path, kind: str, text_column: str | None) -> Sequence[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        table = load_dataset(kind, data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as {kind}: {error.__cause__ or error}") from error
    column = text_column or ("text" if "text" in table.column_names else _only_text_column(path, table))
    if column not in table.column_names:
        raise InputError(f"{path} has no column '{column}'; {nearest(column, table.column_names)}")
    texts: Sequence[str] = table[column]
    return texts


def _only_text_column(path: Path, table: Any) -> str:
    columns = [name for name, feature in table.features.items() if getattr(feature, "dtype", None) == "string"]
    if len(columns) != 1:
        raise InputError(
            f"{path} has columns {', '.join(table.column_names)}: say which holds the text (--text-column)"
        )
    return str(columns[0])


def read_token_rows(path: Path, tensor: str) -> Tensor:
    """Token ids [n, seqlen] from a safetensors file."""
    headers = read_headers(path)
    if tensor not in headers:
        raise InputError(
            f"{path} has no tensor '{tensor}'; {nearest(tensor, headers)} (give it as FILE.safetensors:NAME)"
        )
    header = headers[tensor]
    if len(header.shape) != 2 or header.shape[1] < 2 or header.dtype.is_floating_point or header.dtype == torch.bool:
        raise InputError(
            f"{path}: '{tensor}' is {header.dtype} {list(header.shape)}, not integer ids [n, seqlen] "
            "with seqlen 2 or more"
        )
    return read_tensors(path, [tensor])[tensor].long()


def _hub_texts(repository: str, file: str, kind: str) -> Sequence[str]:
    """Texts of one pinned file of a data set on the hub, from the cache where it is there."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # no network, no cache, a moved file: the hub's client has no common error for them
        raise InputError(
            f"{repository} ({Path(file).name}) is not in the Hugging Face cache and cannot be downloaded "
            f"({type(error).__name__}); give a local file instead of its name"
        ) from error
    return _text_column(path, kind, "text")


def _wikitext2(split: str) -> Sequence[str]:
    """The whole split as one document, lines joined by a blank line: the field's protocol."""
    lines = _hub_texts("Salesforce/wikitext", f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet", "parquet")
    return ["\n\n".join(lines)]


def _c4(split: str) -> Sequence[str]:
    """Pinned files: the first training shard; of the first test shard 1,100 documents joined by a space."""
    texts = _hub_texts("allenai/c4", C4[split], "json")
    return texts if split == "train" else [" ".join(texts[:1100])]


NAMED: dict[str, Callable[[str], Sequence[str]]] = {"wikitext2": _wikitext2, "c4": _c4}


def draw(
    corpus: Corpus,
    tokenizer: Callable[[], Any],
    vocabulary: int,
    seqlen: int,
    nsamples: int,
    heldout: int,
    seed: int,
    rounds: int = 1,
) -> Draw:
    """`nsamples` calibration rows and up to `heldout` others, drawn with the seed; as many again a further round.

    Held-out rows are what remains when there are too few for both; they are in no round. Rounds get rows that no round
    before them had, and when those run out, reshuffled ones. Raises InputError when calibration itself is short, or
    when an id is outside the vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = corpus.rows(tokenizer, seqlen, nsamples + heldout, generator, (rounds - 1) * nsamples)
    if len(rows) < nsamples:
        raise InputError(
            f"{corpus.source} gives {len(rows)} sequences of {seqlen} tokens and {nsamples} are asked for; "
            "use more text, a smaller --nsamples or a shorter --seqlen"
        )
    check_vocabulary(rows, vocabulary, corpus.source)
    calibration, held = rows[:nsamples], rows[nsamples : nsamples + heldout]
    pool = torch.cat([calibration, rows[nsamples + heldout :]])
    chosen = _further(len(pool), nsamples, rounds, generator)
    further = [pool[indices] for indices in chosen[1:]]
    facts: dict[str, Any] = {
        "dataset": corpus.source,
        "sequences": len(calibration),
        "seqlen": calibration.shape[1],
        "tokens": calibration.numel(),
        "heldout_sequences": len(held),
        "sha256": content_hash(calibration),
        "heldout_sha256": content_hash(held),
    }
    if further:
        facts["rounds"] = {
            "sequences_seen": len(set(torch.cat(chosen).tolist())),
            "fresh": [number * nsamples + nsamples <= len(pool) for number in range(rounds)],
            "sha256": [content_hash(part) for part in further],
        }
    return Draw(calibration, held, further, facts)


def _further(count: int, nsamples: int, rounds: int, generator: torch.Generator) -> list[Tensor]:
    """Which of `count` rows each round gets, the first too: the next ones, and reshuffled ones when none are left."""
    order = torch.arange(count)
    parts = [order[number * nsamples : (number + 1) * nsamples] for number in range(rounds)]
    return [part if len(part) == nsamples else torch.randperm(count, generator=generator)[:nsamples] for part in parts]


def check_vocabulary(rows: Tensor, vocabulary: int, source: str) -> None:
    """Raises InputError when an id is not one of the model's."""
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < vocabulary:
        raise InputError(
            f"{source} holds token ids {int(rows.min())}…{int(rows.max())} and the model knows 0…{vocabulary - 1}; "
            "tokenise it with this model's tokenizer"
        )


def content_hash(rows: Tensor) -> str:
    """SHA-256 over the ids as int64: the same tokens give the same hash, whatever file they came from."""
    return hashlib.sha256(rows.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def batches(rows: Tensor, size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Rows as keyword arguments of a causal language model, `size` rows each."""
    return [{"input_ids": part.to(device)} for part in torch.split(rows, size)]
