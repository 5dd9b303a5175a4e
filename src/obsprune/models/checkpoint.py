"""Safetensors checkpoints on disk: which tensor lies where, how its name becomes a module's name, and shards written so
that nothing half-done ever loads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from obsprune.errors import InputError, OutputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
SIDE_FILES = ("*.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a file says about one tensor without reading it."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors, single or sharded, with the headers of all its tensors."""

    directory: Path
    headers: dict[str, Header]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Reads index and headers. Raises InputError for everything that is not a whole safetensors checkpoint."""
        headers: dict[str, Header] = {}
        for file in sorted(_files(directory)):
            headers |= read_headers(directory / file)
        return cls(directory, headers)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, as stored, on the CPU."""
        tensors: dict[str, Tensor] = {}
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.headers[key].file, []).append(key)
        for file, wanted in by_file.items():
            tensors |= read_tensors(self.directory / file, wanted)
        return tensors

    @property
    def bytes(self) -> int:
        return sum(header.bytes for header in self.headers.values())

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resumed run: every weight file's size and time of last change."""
        files = sorted({header.file for header in self.headers.values()})
        stats = {file: (self.directory / file).stat() for file in files}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _files(directory: Path) -> set[str]:
    """The safetensors files of a checkpoint, all of them present and inside the directory."""
    if (directory / INDEX).is_file():
        try:
            named = {str(file) for file in json.loads((directory / INDEX).read_text())["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{directory / INDEX} is not a safetensors index: {error}") from error
        for file in named:
            if Path(file).name != file:
                raise InputError(f"{directory / INDEX} names '{file}', which is outside the checkpoint's directory")
            if not (directory / file).is_file():
                raise InputError(f"{directory} lacks '{file}', which its index names; download the checkpoint again")
        return named
    if (directory / SINGLE).is_file():
        return {SINGLE}
    others = sorted(
        path.name for path in [*directory.glob("*.bin"), *directory.glob("*.pth"), *directory.glob("*.gguf")]
    )
    found = (
        f" (it has {', '.join(others[:3])}; save it with save_pretrained, which writes safetensors)" if others else ""
    )
    raise InputError(f"{directory} holds no {SINGLE} and no {INDEX}{found}")


def read_headers(path: Path) -> dict[str, Header]:
    """The headers of one safetensors file. Raises InputError when it is truncated or damaged."""
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return {key: _header(path, key, part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or no safetensors file ({error}); download it again") from error


def _header(path: Path, key: str, dtype: str, shape: list[int]) -> Header:
    if dtype not in DTYPES:
        raise InputError(
            f"{path}: tensor {key} has dtype {dtype}, which cannot be pruned; use an unquantised checkpoint"
        )
    return Header(path.name, DTYPES[dtype], tuple(shape))


def read_tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of one file by name."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); download it again") from error


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


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, atomically. One metadata entry only: several would come in random order."""
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(contiguous, temporary, metadata={"format": "pt"}))


def write_text(path: Path, text: str) -> None:
    """One text file, atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text))


def write_index(directory: Path) -> None:
    """The index over all shards of the directory: with it (and a config) the checkpoint is whole."""
    headers: dict[str, Header] = {}
    for path in sorted(directory.glob("model-*.safetensors")):
        headers |= read_headers(path)
    weight_map = {key: header.file for key, header in sorted(headers.items())}
    total = sum(header.bytes for header in headers.values())
    write_text(directory / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))


def copy_side_files(source: Path, directory: Path) -> None:
    """Tokenizer, generation config, licence and the like; the config comes last, since it makes the result loadable."""
    paths = {path for pattern in SIDE_FILES for path in source.glob(pattern)}
    for path in sorted(paths, key=lambda path: (path.name == CONFIG, path.name)):
        if path.name != INDEX and path.is_file():
            write_atomic(directory / path.name, lambda temporary, path=path: shutil.copyfile(path, temporary))
