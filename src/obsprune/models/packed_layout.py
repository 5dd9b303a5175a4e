"""A packed checkpoint as any other one: its tensors are unpacked when they are read.

What lies beside the weights is copied to a temporary directory, with the config as it was before packing, for all that
wants a config, a tokenizer or an image processor; it lives as long as the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

from torch import Tensor

from obsprune.models.caution import refuse_links
from obsprune.models.checkpoint import CONFIG, PACKED_INDEX, SIDE_FILES, Checkpoint, copy_side_files, write_text
from obsprune.models.files import DTYPES, Layout, header_of
from obsprune.models.packed import PackedCheckpoint, PackedFile, Stored


@final
@dataclass(frozen=True)
class UnpackedCheckpoint(Checkpoint):
    """Tensors as they were before packing. packed: the files; places: where each tensor is; side: holds `directory`
    in life.
    """

    packed: PackedCheckpoint
    places: Mapping[str, tuple[PackedFile, Stored]]
    side: TemporaryDirectory[str]

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        return {key: file.tensor(stored) for key in keys for file, stored in [self.places[key]]}

    def paths(self) -> list[Path]:
        return [self.packed.directory / PACKED_INDEX, *(file.path for file in self.packed.files)]


@final
class PackedLayout(Layout):
    """A directory as `obsprune pack` makes it."""

    patterns = ("obsprune-*.safetensors",)

    def found(self, directory: Path) -> bool:
        return PackedCheckpoint.found(directory)

    def open(self, directory: Path) -> UnpackedCheckpoint:
        """Reads index and headers. Raises InputError when they are not as they were written."""
        refuse_links(directory, (*SIDE_FILES, *self.patterns))
        packed = PackedCheckpoint.open(directory)
        places = {stored.name: (file, stored) for file in packed.files for stored in file.tensors}
        headers = {
            name: header_of(file.path, name, DTYPES.get(stored.dtype), stored.shape, stored.dtype)
            for name, (file, stored) in places.items()
        }
        side = TemporaryDirectory(prefix=f"obsprune-{directory.name}-")
        copy_side_files(directory, Path(side.name))
        write_text(Path(side.name) / CONFIG, packed.texts[CONFIG])
        return UnpackedCheckpoint(Path(side.name), headers, packed, places, side)


PACKED = PackedLayout()
