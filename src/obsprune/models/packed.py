"""Packed checkpoints: safetensors files with every tensor in less room, an index with their sums, and the way back.

A packed file holds, under each tensor's name, its bytes as `planes` packs them, and the header of the file it was made
of; so that file comes back byte by byte. docs/formats.md is the specification.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from obsprune.errors import InputError, first_line
from obsprune.models import planes
from obsprune.models.caution import is_file, json_values, unique
from obsprune.models.checkpoint import CONFIG, PACKED_INDEX, write_atomic, write_text
from obsprune.models.files import DTYPES, SAFETENSORS
from obsprune.progress import Progress

METHOD, VERSION = "obsprune", 1
"""What config.json calls it (quant_method), and the version of the format."""
LENGTH = struct.Struct("<Q")
"""How a safetensors file begins: the bytes of its header."""
MOST = 10**15
"""As many digits as no length and no offset has."""
BEGINNING = b'{"__metadata__": {"format": "pt", "obsprune": '
"""Of the header of a packed file."""
AGAIN = "pack it again, or download it again"


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file: dtype as the file calls it, its bytes from `begin` to `end` of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @property
    def size(self) -> int:
        """Bytes an element; 1 where elements have no whole number of bytes that a processor computes with."""
        count = math.prod(self.shape)
        size = self.bytes // count if count else 1
        return size if size in planes.SIZES and size * count == self.bytes else 1

    @property
    def seed(self) -> int:
        """What its sum begins with: bytes under another name, or in another shape, have another sum."""
        return zlib.crc32(json.dumps([self.name, self.dtype, self.shape]).encode())


class Container:
    """A safetensors file, mapped into memory: header, tensors in the order of their bytes, and the bytes."""

    def __init__(self, path: Path) -> None:
        """Raises InputError when the file is truncated, or no safetensors file."""
        self.path = path
        try:
            with safe_open(path, "pt"):  # it checks that the header is sound, and that the bytes are all there
                pass
            with path.open("rb") as file:
                (length,) = LENGTH.unpack(file.read(LENGTH.size))
                self.header = file.read(length)
            self.text = self.header.decode()
            self.tensors, self.metadata = read_header(self.text)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{path} is truncated or no safetensors file ({first_line(error)}); download it again"
            ) from error

    @cached_property
    def data(self) -> planes.Bytes:
        """All bytes after the header."""
        begin = LENGTH.size + len(self.header)
        if self.path.stat().st_size == begin:  # an empty file cannot be mapped
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", offset=begin)

    def raw(self, stored: Stored) -> planes.Bytes:
        """A tensor's bytes, as they are in the file."""
        return np.asarray(self.data[stored.begin : stored.end])


def read_header(text: str) -> tuple[list[Stored], dict[str, str]]:
    """The tensors that a header names, in the order of their bytes, and its metadata. Raises ValueError."""
    try:
        entries = json.loads(text, object_pairs_hook=unique)
        metadata = entries.pop("__metadata__", {})
        found = [Stored(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in entries.items()]
        tensors = sorted(found, key=lambda stored: (stored.begin, stored.end, stored.name))
        numbers = [(stored.begin, stored.end, *stored.shape) for stored in tensors]
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not one: {first_line(error)}") from error
    whole = all(isinstance(number, int) and number >= 0 for row in numbers for number in row)
    if not whole or any(before[1] != after[0] for before, after in pairwise([(0, 0), *numbers])):
        raise ValueError("its header is not one: the tensors do not lie one behind the other")
    return tensors, metadata


@final
class PackedFile:
    """One packed file. tensors: as they were before."""

    def __init__(self, path: Path) -> None:
        """Raises InputError when it is truncated, or was not made by obsprune."""
        self.path = path
        self._file = Container(path)
        self._packed = {stored.name: stored for stored in self._file.tensors}
        try:
            self.text = self._file.metadata[METHOD]
            self.tensors, _ = read_header(self.text)
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path} is no packed file, or damaged ({first_line(error)}); {AGAIN}") from error
        if {stored.name for stored in self.tensors} != self._packed.keys():
            raise InputError(f"{path} does not hold the tensors it names; {AGAIN}")

    @property
    def sum(self) -> int:
        """Of its header, which the index knows."""
        return zlib.crc32(self._file.header)

    def read(self, stored: Stored) -> planes.Bytes:
        """A tensor's bytes, as they were before. Raises InputError when they are damaged."""
        try:
            return planes.unpack(
                self._file.raw(self._packed[stored.name]), stored.size, stored.bytes // stored.size, stored.seed
            )
        except planes.Damaged as error:
            raise InputError(f"{self.path} is damaged at tensor {stored.name}: {error}; {AGAIN}") from error

    def tensor(self, stored: Stored) -> Tensor:
        """A tensor, as it was before. Raises InputError when it is damaged."""
        dtype = DTYPES.get(stored.dtype)
        if dtype is None or dtype.itemsize * math.prod(stored.shape) != stored.bytes:
            raise InputError(
                f"{self.path}: tensor {stored.name} has dtype {stored.dtype}, which only unpack brings back; "
                f"obsprune unpack {self.path.parent} -o DIRECTORY"
            )
        dense = self.read(stored)
        if not stored.bytes:  # torch has no other view of no bytes
            return torch.empty(stored.shape, dtype=dtype)
        return torch.from_numpy(dense).view(dtype).reshape(stored.shape)


def pack_file(source: Path, target: Path, progress: Progress) -> None:
    """Writes a packed file, atomically, tensor by tensor. Raises InputError, OutputError."""
    dense = Container(source)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write_packed(file, dense, progress)

    write_atomic(target, write)


def _write_packed(file: BinaryIO, dense: Container, progress: Progress) -> None:
    """First the tensors, since only then it is known how long they are; then the header, in the room left for it."""
    room = len(_header(dense, {stored.name: (MOST, 2 * MOST) for stored in dense.tensors}))
    file.seek(LENGTH.size + room)
    places: dict[str, tuple[int, int]] = {}
    compressor = planes.make_compressor()
    for stored in dense.tensors:
        progress.detail(stored.name)
        begin = file.tell() - LENGTH.size - room
        file.writelines(planes.pack(dense.raw(stored), stored.size, stored.seed, compressor))
        places[stored.name] = (begin, file.tell() - LENGTH.size - room)
        progress.step()
    file.seek(0)
    file.write(LENGTH.pack(room) + _header(dense, places).ljust(room))


def _header(dense: Container, places: Mapping[str, tuple[int, int]]) -> bytes:
    """Of a packed file whose tensors lie there; a multiple of 8 bytes, as other libraries like it."""
    entries = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in places.items()
    }
    header = json.dumps({"__metadata__": {"format": "pt", METHOD: dense.text}} | entries).encode()
    return header.ljust(-(-len(header) // 8) * 8)


def unpack_file(packed: PackedFile, target: Path, progress: Progress) -> None:
    """Writes the file that a packed one was made of, atomically, tensor by tensor. Raises InputError, OutputError."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            header = packed.text.encode()
            file.write(LENGTH.pack(len(header)) + header)
            for stored in packed.tensors:
                progress.detail(stored.name)
                file.write(packed.read(stored).data)
                progress.step()

    write_atomic(target, write)


@final
@dataclass(frozen=True)
class PackedCheckpoint:
    """A directory of packed files. names: {packed file: the one it was made of}; texts: {file that unpacking writes
    anew: its text}; files: the packed ones.
    """

    directory: Path
    names: dict[str, str]
    texts: dict[str, str]
    files: list[PackedFile]

    @staticmethod
    def found(directory: Path) -> bool:
        """Whether a directory holds a packed checkpoint."""
        return is_file(directory / PACKED_INDEX)

    @staticmethod
    def open(directory: Path) -> PackedCheckpoint:
        """Reads index and headers. Raises InputError when they are not as they were written."""
        path = directory / PACKED_INDEX
        names, sums, texts = _read_index(path)
        for name in [*names, *names.values()]:
            if name != Path(name).name or not name.endswith(".safetensors") or name.startswith("."):
                raise InputError(f"{path} names '{name}', which is no file of a checkpoint")
        files = [PackedFile(directory / name) for name in names]
        for file in files:
            if file.sum != sums[file.path.name]:
                raise InputError(f"the header of {file.path} is not as {path.name} says; {AGAIN}")
        return PackedCheckpoint(directory, names, texts, files)

    @property
    def tensors(self) -> list[Stored]:
        return [stored for file in self.files for stored in file.tensors]


def write_packed_index(directory: Path, names: Mapping[str, str], texts: Mapping[str, str]) -> None:
    """The index over the packed files of a directory; as PackedCheckpoint has them."""
    files = [PackedFile(directory / name) for name in names]
    weight_map = {stored.name: file.path.name for file in files for stored in file.tensors}
    metadata = {
        "total_size": sum(stored.bytes for file in files for stored in file.tensors),
        "version": VERSION,
        "names": dict(names),
        "crc32": {file.path.name: file.sum for file in files},
        "texts": dict(texts),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / PACKED_INDEX, json.dumps({"crc32": _sum(index)} | index, indent=1))


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, int], dict[str, str]]:
    """Names, sums and texts. Raises InputError when something is not as it was written."""
    try:
        index = json_values(path, unique)
        crc, version = index.pop("crc32"), index["metadata"]["version"]
        if version != VERSION:
            raise InputError(f"{path} is of version {version!r} of the format, and this obsprune reads {VERSION}")
        if crc != _sum(index):
            raise ValueError("its sum is not right")
        names, sums, texts = (dict(index["metadata"][key]) for key in ("names", "crc32", "texts"))
        if names.keys() != sums.keys() or texts.keys() - {SAFETENSORS.index} != {CONFIG}:
            raise ValueError("it names other files than it should")
        return {str(name): str(of) for name, of in names.items()}, sums, texts
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); {AGAIN}") from error


def _sum(index: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def packed_config(text: str) -> str:
    """The config of a packed checkpoint. Raises ValueError for a text that is no config, InputError for one that is
    quantised.
    """
    config = json.loads(text)
    if not isinstance(config, dict):
        raise ValueError("it is no table")
    if config.get("quantization_config"):
        raise InputError("a quantised checkpoint cannot be packed; pack the one it was made from")
    return json.dumps(config | {"quantization_config": {"quant_method": METHOD, "version": VERSION}}, indent=2) + "\n"


def packed_names(names: Iterable[str]) -> dict[str, str]:
    """{packed file: the one it is made of}."""
    ordered = sorted(names)
    return {f"obsprune-{i:05d}-of-{len(ordered):05d}.safetensors": name for i, name in enumerate(ordered, 1)}
