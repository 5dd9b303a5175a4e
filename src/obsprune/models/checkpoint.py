"""Checkpoints on disk: which tensor lies where, and shards written so that nothing half-done ever loads."""

from __future__ import annotations

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from obsprune.errors import InputError, OutputError, first_line
from obsprune.models.caution import is_file, json_values, refuse_links, unique
from obsprune.models.files import FILE_KINDS, SAFETENSORS, FileKind, Header

INDEX = SAFETENSORS.index
SINGLE = SAFETENSORS.single
CONFIG = "config.json"
PACKED_INDEX = "obsprune.safetensors.index.json"
"""Not model.safetensors.index.json: transformers alone must find nothing that it would take for weights."""
MADE = "obsprune.json"
"""Says of a directory that obsprune has made it, where nothing else there does: it may be replaced with --force."""
REPORT = "report.json"
"""About the weights of a result, and no others."""
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|absmax|quant_map)$"
    r"|\.quant_state\.|_proj_(blocks|scales)$"
)
"""Names that GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8 and MXFP4 checkpoints have."""
SIDE_FILES = ("*.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*")

read_headers, read_tensors = SAFETENSORS.headers, SAFETENSORS.read
"""Of one file that obsprune has written."""


@dataclass(frozen=True)
class Checkpoint(ABC):
    """Tensors under Hugging Face names, wherever they lie, and their headers. directory: where config and tokenizer
    are.
    """

    directory: Path
    headers: dict[str, Header]

    @staticmethod
    def open(directory: Path) -> Checkpoint:
        """Reads index and headers. Raises InputError for everything that is not a whole checkpoint."""
        kind = next((kind for kind in FILE_KINDS if kind.found(directory)), None)
        if kind is None and is_file(directory / PACKED_INDEX):
            raise InputError(f"{directory} is packed; obsprune unpack {directory} -o DIRECTORY first")
        if kind is None:
            raise InputError(f"{directory} holds no {SINGLE} and no {INDEX}{_others(directory)}")
        refuse_links(directory, (*SIDE_FILES, *kind.patterns))
        headers: dict[str, Header] = {}
        for file, promised in sorted(_files(directory, kind).items()):
            found = kind.headers(directory / file)
            _check_shard(directory / file, found, promised, headers)
            headers |= found
        return FileCheckpoint(directory, headers, kind)

    @abstractmethod
    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, as stored, on the CPU."""

    @abstractmethod
    def paths(self) -> list[Path]:
        """All files that decide what `read` gives."""

    @property
    def bytes(self) -> int:
        return sum(header.bytes for header in self.headers.values())

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resumed run: every weight file's size and time of last change."""
        stats = {path.name: path.stat() for path in self.paths()}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


@final
@dataclass(frozen=True)
class FileCheckpoint(Checkpoint):
    """A directory as save_pretrained makes it, today or formerly: one file, or several and an index."""

    kind: FileKind

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.headers[key].file, []).append(key)
        for file, wanted in by_file.items():
            tensors |= self.kind.read(self.directory / file, wanted)
        return tensors

    def paths(self) -> list[Path]:
        return [self.directory / file for file in sorted({header.file for header in self.headers.values()})]


def _files(directory: Path, kind: FileKind) -> dict[str, set[str]]:
    """The weight files of a checkpoint, all of them present and inside the directory, and what should be in each."""
    index = directory / kind.index
    if not index.is_file():
        return {kind.single: set()}
    try:
        weight_map = json_values(index, unique)["weight_map"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is not a {kind.name} index: {first_line(error)}") from error
    named: dict[str, set[str]] = {}
    for key, file in weight_map:
        named.setdefault(str(file), set()).add(key)
    for file in named:
        if file != Path(file).name or "\\" in file or "\0" in file or file == "..":
            raise InputError(f"{index} names '{file}', which is outside the checkpoint's directory")
        if not is_file(directory / file):
            raise InputError(f"{directory} lacks '{file}', which its index names; download the checkpoint again")
    return named


def _check_shard(path: Path, found: Mapping[str, Header], promised: set[str], before: Mapping[str, Header]) -> None:
    """Raises InputError when a file lacks what the index says of it, holds what another holds, or is quantised."""
    if lacking := promised - found.keys():
        raise InputError(f"{path} lacks {min(lacking)}, which the index says it holds; download the checkpoint again")
    for key in sorted(found):
        if key in before:
            raise InputError(f"{key} is in {before[key].file} and in {path}; download the checkpoint again")
        if QUANTISED.search(key):
            raise InputError(f"{path} is quantised (it holds {key}); prune the unquantised checkpoint it was made from")


def _others(directory: Path) -> str:
    """What there is in the place of weights that can be read."""
    endings = ("*.bin", "*.pth", "*.gguf", "*.h5", "*.msgpack")
    others = sorted(path.name for ending in endings for path in directory.glob(ending))
    if not others:
        return ""
    return f" (it has {', '.join(others[:3])}; save it with save_pretrained, which writes safetensors)"


def write_atomic(path: Path, write: Any) -> None:
    """Lets `write(temporary path)` make a file and gives it its name only when it is whole and on the disk.

    Raises OutputError, and leaves no trace, when the disk is full or refuses.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner may read
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {error}; make room or choose another -o, then repeat the command to go on"
        ) from error


def _umask() -> int:
    """What the process takes away from new files; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_scratch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file that need not outlive the process. Raises OutputError."""
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}; make room, then repeat the command to go on") from error


def write_shard(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> None:
    """One safetensors file, atomically. facts: what its metadata say beside the format, which loaders ask for."""
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata = {"format": "pt", **(facts or {})}

    def write(temporary: Path) -> None:
        save_file(contiguous, temporary, metadata=metadata)
        if facts:
            _order_metadata(temporary)

    write_atomic(path, write)


def _order_metadata(path: Path) -> None:
    """Puts the metadata of a file into alphabetical order: safetensors writes several in a random one."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # the same text in another order
        file.seek(8)
        file.write(text.ljust(length))


def write_text(path: Path, text: str) -> None:
    """One text file in UTF-8, atomically; what is no text (half a pair, from somebody's JSON) is spelt out."""
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", "backslashreplace")))


def in_shards(sizes: Mapping[str, int], most: float) -> Iterator[list[str]]:
    """Names in their order, as many together as have at most so many bytes; one that has more is alone."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def write_index(directory: Path) -> None:
    """The index over all shards of the directory: with it (and a config) the checkpoint is whole."""
    headers: dict[str, Header] = {}
    for path in sorted(directory.glob("model-*.safetensors")):
        headers |= read_headers(path)
    weight_map = {key: header.file for key, header in sorted(headers.items())}
    total = sum(header.bytes for header in headers.values())
    write_text(directory / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))


def copy_side_files(source: Path, directory: Path) -> None:
    """Tokenizer, generation config, licence and the like; the config comes last, since it makes the result loadable.
    What obsprune itself has written about the source is left out.
    """
    refuse_links(source, SIDE_FILES)
    paths = {path for pattern in SIDE_FILES for path in source.glob(pattern)}
    others = {PACKED_INDEX, MADE, REPORT, *(kind.index for kind in FILE_KINDS)}
    for path in sorted(paths, key=lambda path: (path.name == CONFIG, path.name)):
        if path.name not in others and path.is_file():
            write_atomic(directory / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))
