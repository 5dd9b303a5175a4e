"""The kinds of files weights come in, each a value: what it is called, and how headers and tensors are read from it."""

from __future__ import annotations

import json
import pickle
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from obsprune.errors import InputError, first_line
from obsprune.models.caution import unique

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
ZIP = b"PK\x03\x04"
"""How every file that torch.save has written since 1.6 begins; older ones cannot be mapped into memory."""


@dataclass(frozen=True)
class Header:
    """What a file says about one tensor without reading it."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Layout(ABC):
    """A form in which a directory can hold weights. patterns: the files to fetch from the hub."""

    patterns: tuple[str, ...]

    @abstractmethod
    def found(self, directory: Path) -> bool:
        """Whether a directory holds weights in this form."""


class FileKind(Layout):
    """name: what such a file is called; single, index: the one file of a checkpoint, or the index of its several."""

    name: str
    single: str
    index: str

    def found(self, directory: Path) -> bool:
        return (directory / self.index).is_file() or (directory / self.single).is_file()

    @abstractmethod
    def headers(self, path: Path) -> dict[str, Header]:
        """The headers of one file. Raises InputError when it is truncated, damaged or quantised."""

    @abstractmethod
    def read(self, path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of one file by name, on the CPU, no two in the same memory. Raises InputError."""


@final
class Safetensors(FileKind):
    """Hugging Face's format."""

    name, single, index = "safetensors", "model.safetensors", "model.safetensors.index.json"
    patterns = ("*.safetensors",)

    def headers(self, path: Path) -> dict[str, Header]:
        try:
            with safe_open(path, "pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                found = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
            _check_names(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is truncated or no safetensors file ({error}); download it again") from error
        return {key: header_of(path, key, DTYPES.get(dtype), shape, dtype) for key, (dtype, shape) in found.items()}

    def read(self, path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}); download it again") from error


def _check_names(path: Path) -> None:
    """Raises ValueError for a name that is there twice: whatever else is wrong with a header, safetensors refuses."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=unique)


@final
class Pickled(FileKind):
    """What torch.save writes: read without running anything that a file may hold, mapped into memory, not loaded."""

    name, single, index = "PyTorch", "pytorch_model.bin", "pytorch_model.bin.index.json"
    patterns = ("pytorch_model*.bin",)

    def headers(self, path: Path) -> dict[str, Header]:
        known, mapped = set(DTYPES.values()), self._mapped(path)
        for key, tensor in mapped.items():
            if tensor.nbytes > path.stat().st_size:  # one number, repeated
                raise InputError(f"{path}: tensor {key} says it has {tensor.nbytes:,} bytes, more than the file has")
        return {
            key: header_of(path, key, tensor.dtype if tensor.dtype in known else None, tensor.shape, str(tensor.dtype))
            for key, tensor in mapped.items()
        }

    def read(self, path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
        mapped = self._mapped(path)  # tied weights lie in one place there: each gets a copy of its own
        return {key: mapped[key].detach().clone(memory_format=torch.contiguous_format) for key in keys}

    def _mapped(self, path: Path) -> dict[str, Tensor]:
        try:
            with path.open("rb") as file:
                maps = file.read(len(ZIP)) == ZIP
            held: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=maps)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path} is damaged, or holds Python objects beside its tensors, which could run any code and are not "
                "opened; download it again, or save it with save_pretrained, which writes safetensors"
            ) from error
        except Exception as error:  # damaged files fail in every way there is
            raise InputError(
                f"{path} is truncated or no PyTorch file ({first_line(error)}); download it again"
            ) from error
        plain = isinstance(held, dict) and all(isinstance(tensor, Tensor) for tensor in held.values())
        if not plain or not all(tensor.layout == torch.strided and tensor.is_cpu for tensor in held.values()):
            raise InputError(f"{path} is no table of tensors by name; save the model with save_pretrained")
        return {str(key): tensor for key, tensor in held.items()}


def header_of(path: Path, key: str, dtype: torch.dtype | None, shape: Iterable[int], said: str) -> Header:
    """The header of a tensor whose dtype the file calls `said`. Raises InputError where it is no dtype to prune in."""
    if dtype is None:
        raise InputError(
            f"{path}: tensor {key} has dtype {said}, which cannot be pruned; use an unquantised checkpoint"
        )
    return Header(path.name, dtype, tuple(shape))


SAFETENSORS, PICKLED = Safetensors(), Pickled()
FILE_KINDS: tuple[FileKind, ...] = (SAFETENSORS, PICKLED)
"""The first one that a directory holds is read."""
