"""Where text comes from: named corpora of the hub, text files, tables, files of token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obsprune.errors import InputError, first_line, nearest
from obsprune.models.caution import is_dir, is_file
from obsprune.models.checkpoint import read_headers, read_tensors
from obsprune.models.text import Corpus, Documents, TokenRows

SEPARATOR = "<|endoftext|>"
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
DEEPEST = 100
"""Lists and objects inside one another in a line of JSON."""
TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}


@dataclass(frozen=True)
class Reading:
    """How text becomes rows for one model. text_column: of a table, where it has several."""

    tokenizer: Callable[[], Any]
    vocabulary: int
    seqlen: int
    text_column: str | None = None


def open_corpus(source: str, how: Reading, split: str = "train") -> Corpus:
    """`wikitext2`, `c4`, or a path: .txt, .jsonl, .json, .csv, .parquet, FILE.safetensors[:TENSOR].

    Raises InputError when it is unknown, missing, empty, or of another form.
    """
    if source in NAMED:
        return Documents(source, NAMED[source](split), how.tokenizer, how.seqlen, how.vocabulary)
    name, _, tensor = source.partition(".safetensors")
    path = Path(f"{name}.safetensors" if tensor or source.endswith(".safetensors") else source).expanduser()
    if not is_file(path):
        _refuse(source, path)
    if path.suffix == ".safetensors":
        ids = read_token_rows(path, tensor.removeprefix(":") or "input_ids")
        return TokenRows(source, ids, how.seqlen, how.vocabulary)
    return Documents(source, read_documents(path, how.text_column), how.tokenizer, how.seqlen, how.vocabulary)


def _refuse(source: str, path: Path) -> None:
    if is_dir(path):
        raise InputError(
            f"{source} is a directory; give a file of it (.txt, .jsonl, .json, .csv, .parquet, .safetensors)"
        )
    if path.suffix or "/" in source:
        raise InputError(f"there is no file {source}")
    raise InputError(f"unknown dataset '{source}'; {nearest(source, NAMED)}, or a path")


def read_documents(path: Path, text_column: str | None = None) -> Sequence[str]:
    """The texts of a file. Raises InputError when it cannot be read, or holds none."""
    try:
        texts = read_text(path) if path.suffix == ".txt" else read_table(path, text_column)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not len(texts):
        raise InputError(f"{path} is empty: it holds no text")
    return texts


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
    if not path.stat().st_size:
        return []
    if reason := CHECKS[kind](path):
        raise InputError(f"{path} cannot be read as {kind}: {reason}")
    return _text_column(path, kind, text_column)


def _json_unfit(path: Path) -> str | None:
    """Why pyarrow must not see a file: it unpacks what looks like an archive, and nulls in the place of objects and
    deep nesting end the process.
    """
    with path.open("rb") as file:
        first = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        file.seek(0)
        if first == b"[":
            return _list_unfit(file.read())
        if first != b"{":
            return "it begins with neither { nor ["
        return next((told for number, line in enumerate(file, 1) if (told := _line_unfit(number, line))), None)


def _list_unfit(text: bytes) -> str | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return first_line(error)
    alike = any(all(isinstance(value, kind) for value in values) for kind in (dict, str))
    return None if alike and _depth(text) <= DEEPEST else "it is no list of objects, nor of texts"


def _line_unfit(number: int, line: bytes) -> str | None:
    if line.lstrip().startswith(b"null"):
        return f"line {number} begins with null; give one object on each line"
    deep = line.count(b"[") + line.count(b"{") > DEEPEST and _depth(line) > DEEPEST
    return f"line {number} is nested more than {DEEPEST} deep" if deep else None


def _depth(line: bytes) -> int:
    """How many lists and objects are open at once in a line of JSON."""
    steps = (STEPS.get(match[0], 0) for match in TOKENS.finditer(line))
    return max(accumulate(steps), default=0)


def _csv_unfit(path: Path) -> str | None:
    with path.open("rb") as file:
        return "it is no text" if b"\0" in file.read(512) else None


def _parquet_unfit(path: Path) -> str | None:
    with path.open("rb") as file:
        return None if file.read(4) == b"PAR1" else "it does not begin as such files do"


def _text_column(path: Path, kind: str, text_column: str | None) -> Sequence[str]:
    from datasets import load_dataset

    try:
        table = load_dataset(kind, data_files=escape(str(path)), split="train")
    except Exception as error:  # a damaged file: pyarrow, pandas and the library itself have no common error
        raise InputError(f"{path} cannot be read as {kind}: {first_line(error.__cause__ or error)}") from error
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


CHECKS: dict[str, Callable[[Path], str | None]] = {
    "json": _json_unfit,
    "csv": _csv_unfit,
    "parquet": _parquet_unfit,
}
"""By kind: why a file cannot be one; None when it may."""
NAMED: dict[str, Callable[[str], Sequence[str]]] = {"wikitext2": _wikitext2, "c4": _c4}
