"""From an image's encoded bytes to what a model is given: decoding, the model's own processor, worker processes.

Images are processed one by one, so that neither batches nor workers can change a pixel. Workers give numpy arrays:
these come through a pipe, and not, as tensors, through shared memory, of which containers have 64 MB.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor

from obsprune.errors import InputError, first_line

Array = NDArray[np.float32]
FEW = 32
"""So many images are decoded here: workers take 0.1 s to start and to end."""
MOST_WORKERS = 4
CROP_PCT_BELOW = 384
"""ConvNeXt's processor, the one with a crop_pct of its own and larger sizes, crops only images smaller than this."""


# ------------------------------------------------------------------------------------------------ the processor


def load_processor(directory: Path, trust_remote_code: bool = False) -> Any:
    """The image processor of a checkpoint, the one that works with PIL. Raises InputError when there is none."""
    make: Any = AutoImageProcessor.from_pretrained
    try:
        return make(directory, backend="pil", trust_remote_code=trust_remote_code)  # unsaid, it would ask on stdin
    except Exception as error:  # every processor class fails in its own way
        raise InputError(
            f"{directory} has no usable image processor ({first_line(error)}); "
            "copy preprocessor_config.json from the model it was made from"
        ) from error


def pixels(processor: Any, image: Image.Image) -> Array:
    """What the model is given for one RGB image, [3, H, W]."""
    made = processor(images=[image], return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(made[0], dtype=np.float32)


def output_size(processor: Any) -> tuple[int, int]:
    """Height and width of what the model is given. Raises InputError when they depend on the image, or the processor's
    settings cannot be carried out.
    """
    try:
        shapes = {pixels(processor, Image.new("RGB", size)).shape[-2:] for size in ((320, 256), (256, 320))}
    except Exception as error:  # every setting fails in its own way
        raise InputError(
            f"the image processor fails ({first_line(error)}); mend preprocessor_config.json, or copy it from the "
            "model this one was made from"
        ) from error
    if len(shapes) > 1:
        told = " or ".join(f"{height}×{width}" for height, width in sorted(shapes))
        raise InputError(
            f"the image processor neither crops nor resizes to one size (it gives {told}); "
            "set crop_size or size in preprocessor_config.json"
        )
    height, width = shapes.pop()
    return int(height), int(width)


def settings(processor: Any) -> dict[str, Any]:
    """What the processor does, as plain values; who wrote the file and with what version is left out."""
    plain = {key: _plain(value) for key, value in processor.to_dict().items()}
    return {key: value for key, value in sorted(plain.items()) if value is not None and not key.endswith("version")}


def preprocessing(processor: Any) -> dict[str, Any]:
    """The processor's settings under the names of evaluation reports; crop_pct: share of the resized side that is kept.

    A crop that a processor's settings do not tell (LeViT's) is not seen: crop_pct is then 1.
    """
    told = settings(processor)
    crops = bool(told.get("do_center_crop"))
    resample = told.get("resample")
    return {
        "resize": told.get("size") if told.get("do_resize") else None,
        "crop": told.get("crop_size") if crops else None,
        "crop_pct": _crop_pct(told, crops),
        "interpolation": None if resample is None else Image.Resampling(resample).name.lower(),
        "mean": told.get("image_mean") if told.get("do_normalize") else None,
        "std": told.get("image_std") if told.get("do_normalize") else None,
    }


def _crop_pct(told: dict[str, Any], crops: bool) -> float:
    size, crop = told.get("size") or {}, told.get("crop_size") or {}
    side = size.get("shortest_edge") or size.get("height")
    if told.get("crop_pct") and (side or 0) < CROP_PCT_BELOW:
        return round(float(told["crop_pct"]), 4)
    return round(crop["height"] / side, 4) if crops and side and crop.get("height") else 1.0


def _plain(value: Any) -> Any:
    """Without tuples, enumerations and other types than JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | str | float | None) else int(value)


# ------------------------------------------------------------------------------------------------ encoded images


class Unreadable(Exception):
    """An image that cannot be decoded; says why."""


@dataclass(frozen=True)
class Damage:
    """An image that is left out, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class Pictures(ABC):
    """Encoded images in their order, read one at a time."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, place: int) -> str:
        """What a person finds it by."""

    @abstractmethod
    def encoded(self, place: int) -> bytes:
        """Its bytes, as a file has them. Raises Unreadable."""


@final
@dataclass(frozen=True)
class Files(Pictures):
    """Image files, by their paths from a folder."""

    folder: Path
    paths: Sequence[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, place: int) -> str:
        return self.paths[place]

    def encoded(self, place: int) -> bytes:
        return _read(self.folder / self.paths[place])


@final
@dataclass(frozen=True)
class Cells(Pictures):
    """The images of a `datasets` table whose column is not decoded: bytes, or the path of a file."""

    table: Any
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def name(self, place: int) -> str:
        return f"row {place}"

    def encoded(self, place: int) -> bytes:
        cell = self.table[place][self.column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if cell.get("path") is None:
            raise Unreadable("no image")
        return _read(Path(cell["path"]))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or first_line(error)) from error


def decode(encoded: bytes) -> Image.Image:
    """The whole image in RGB, as it lies in the file: an EXIF orientation is not applied. Raises Unreadable.

    Transparency is dropped; of 16 bits of grey the upper 8 are taken, where PIL's own conversion would clip.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images and odd metadata are told of, and decoded all the same
            return _rgb(Image.open(io.BytesIO(encoded)))
    except UnidentifiedImageError as error:  # its own words hold an address in memory
        raise Unreadable("no image of a known format" if encoded else "an empty file") from error
    except Exception as error:  # every decoder fails in its own way
        raise Unreadable(first_line(error)) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------ worker processes


@dataclass(frozen=True)
class _Jobs(Dataset[Any]):
    pictures: Pictures
    places: Sequence[int]
    work: Callable[[bytes], Any]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        place = self.places[index]
        try:
            return self.work(self.pictures.encoded(place))
        except Unreadable as error:
            return Damage(self.pictures.name(place), str(error))


def each(
    pictures: Pictures,
    places: Sequence[int],
    work: Callable[[bytes], Any],
    chunk: int,
    gather: Callable[[list[Any]], Any] = list,
    expected: int | None = None,
) -> Iterator[Any]:
    """What `work` makes of the bytes of each image, or its Damage; in order, in lists of `chunk`, a few lists ahead.

    By worker processes when many are `expected` (default: all) to be asked for; `gather` is done to a list by its
    worker.
    """
    loader: DataLoader[Any] = DataLoader(
        _Jobs(pictures, places, work),
        batch_size=chunk,
        num_workers=_workers(len(places) if expected is None else expected),
        collate_fn=gather,
        generator=torch.Generator(),  # else it draws from the global one, and who comes after gets other numbers
    )
    yield from loader


def _workers(count: int) -> int:
    if count <= FEW or multiprocessing.current_process().daemon:  # a daemon may have no children
        return 0
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
