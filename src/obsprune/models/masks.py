"""Masks in a file: which weights of a checkpoint survive, a bit each, for other checkpoints of the same architecture.

A safetensors file. Under the name of each tensor, as the checkpoint stores it, lie its bits in bytes (U8): the tensor's
numbers in their order, the first one in the highest bit, 1 = survives; the last byte ends with zeros. The metadata have
one entry, "obsprune-masks": JSON with the version of the format, the pattern ("2:4", …; null where it is not known) and
the shapes {name: [rows, columns]}.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from obsprune.errors import InputError, first_line
from obsprune.models.caution import is_file, unique
from obsprune.models.checkpoint import Checkpoint, in_shards, write_atomic, write_shard
from obsprune.models.files import SAFETENSORS
from obsprune.progress import Progress

ENTRY, VERSION = "obsprune-masks", 1
SHARD = 2**30
"""Bytes that are in memory at once; a tensor that is larger has a shard of its own."""
SHOWN = 3
"""Differences that an error names."""
AGAIN = "export it again"


@final
@dataclass(frozen=True)
class MaskFile:
    """Masks on the disk. shapes: {tensor's name: shape}; pattern: the rule they obey, where that is known."""

    path: Path
    pattern: str | None
    shapes: dict[str, tuple[int, ...]]

    @staticmethod
    def open(path: Path) -> MaskFile:
        """Raises InputError when it is damaged, or holds no masks."""
        if not is_file(path):
            raise InputError(f"there is no file {path}; obsprune mask export DIRECTORY -o FILE makes one")
        headers = SAFETENSORS.headers(path)
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(ENTRY)
        if told is None:
            raise InputError(f"{path} holds no masks; 'obsprune mask export' writes such files")
        try:
            facts = json.loads(told, object_pairs_hook=unique)
            version, pattern = facts["version"], facts["pattern"]
            if version != VERSION:
                raise InputError(f"{path} is of version {version!r} of the format, and this obsprune reads {VERSION}")
            shapes = {str(name): tuple(map(int, shape)) for name, shape in facts["shapes"].items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({first_line(error)}); {AGAIN}") from error
        expected = {name: ((_bytes(shape),), torch.uint8) for name, shape in shapes.items()}
        if expected != {name: (header.shape, header.dtype) for name, header in headers.items()}:
            raise InputError(f"{path} is damaged (it does not hold the masks that it names); {AGAIN}")
        return MaskFile(path, None if pattern is None else str(pattern), shapes)

    def keep(self, name: str) -> Tensor:
        """The mask of a tensor, in its shape: bool, True = survives."""
        packed = SAFETENSORS.read(self.path, [name])[name].numpy()
        bits = np.unpackbits(packed, count=math.prod(self.shapes[name]))
        return torch.from_numpy(bits.view(bool)).reshape(self.shapes[name])

    def require_fit(self, checkpoint: Checkpoint) -> None:
        """Raises InputError, with the differences, unless the checkpoint has all these tensors in these shapes."""
        found = {name: header.shape for name, header in checkpoint.headers.items()}
        differences = [
            f"{name} is {_said(found.get(name))} there and {_said(shape)} in the masks"
            for name, shape in self.shapes.items()
            if found.get(name) != shape
        ]
        if differences:
            more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
            raise InputError(
                f"{self.path} does not fit {checkpoint.directory}: {'; '.join(differences[:SHOWN])}{more}; masks fit "
                "checkpoints of the architecture they come from, in the same form"
            )


def _bytes(shape: Collection[int]) -> int:
    return -(-math.prod(shape) // 8)


def _said(shape: Collection[int] | None) -> str:
    return " x ".join(map(str, shape)) if shape else "missing"


def write_masks(
    path: Path, checkpoint: Checkpoint, names: Collection[str], pattern: str | None, progress: Progress
) -> int:
    """Writes the masks of these tensors, atomically, tensor by tensor. Returns how many weights are zero. Raises
    InputError, OutputError.
    """
    zeros = 0

    def write(temporary: Path) -> None:
        nonlocal zeros
        with temporary.open("wb") as file:
            zeros = _write(file, checkpoint, names, pattern, progress)

    write_atomic(path, write)
    return zeros


def _write(
    file: BinaryIO, checkpoint: Checkpoint, names: Collection[str], pattern: str | None, progress: Progress
) -> int:
    shapes = {name: checkpoint.headers[name].shape for name in names}
    header = _header(shapes, pattern)
    file.write(struct.pack("<Q", len(header)) + header)
    zeros = 0
    for name, shape in shapes.items():
        progress.detail(name)
        keep = checkpoint.read([name])[name].flatten() != 0
        file.write(np.packbits(keep.numpy()).data)
        zeros += math.prod(shape) - int(keep.sum())
        progress.step()
    return zeros


def _header(shapes: Mapping[str, tuple[int, ...]], pattern: str | None) -> bytes:
    """Of a safetensors file, in a multiple of 8 bytes."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        end = at + _bytes(shape)
        entries[name] = {"dtype": "U8", "shape": [end - at], "data_offsets": [at, end]}
        at = end
    facts = json.dumps({"version": VERSION, "pattern": pattern, "shapes": shapes})
    header = json.dumps({"__metadata__": {ENTRY: facts}} | entries).encode()
    return header.ljust(-(-len(header) // 8) * 8)


def write_masked(checkpoint: Checkpoint, masks: MaskFile, directory: Path, progress: Progress) -> int:
    """Writes all tensors, those with a mask under it and the others as they are, shard by shard. Returns how many
    weights became zero. Raises InputError, OutputError.
    """
    sizes = {name: header.bytes for name, header in checkpoint.headers.items()}
    groups, removed = list(in_shards(sizes, SHARD)), 0
    for number, names in enumerate(groups, 1):
        tensors = checkpoint.read(names)
        for name in names:
            progress.detail(name)
            if name in masks.shapes:
                gone = ~masks.keep(name)
                removed += int((tensors[name][gone] != 0).sum())
                tensors[name].masked_fill_(gone, 0)
            progress.step()
        write_shard(directory / f"model-{number:05d}-of-{len(groups):05d}.safetensors", tensors)
    return removed
