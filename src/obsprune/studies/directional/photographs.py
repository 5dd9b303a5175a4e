"""Photographs to train on: folders of images by class, augmented in worker processes by seeds, not by their order."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from obsprune.errors import InputError
from obsprune.models.layouts import SUFFIXES
from obsprune.models.pixels import Files, Pictures, Unreadable, decode
from obsprune.studies.material import Material

PADDING = 4
"""Pixels around an image before a crop of its own size."""
TEST = -1
"""In the place of the number that an image is augmented by: it is not."""

# ------------------------------------------------------------------------------------------------ augmentation


def padded(size: int, x_CHW: Tensor, random: torch.Generator | None) -> Tensor:
    """A crop of the padded image, perhaps its mirror image; without `random` the image, resized where it must be."""
    x_CHW = x_CHW if x_CHW.shape[1:] == (size, size) else _resized(x_CHW, size)
    if random is None:
        return x_CHW
    top, left = torch.randint(2 * PADDING + 1, (2,), generator=random).tolist()
    around = functional.pad(x_CHW, (PADDING,) * 4)
    return _flipped(around[:, top : top + size, left : left + size], random)


def scaled(size: int, x_CHW: Tensor, random: torch.Generator | None) -> Tensor:
    """A crop of 8 to 100 % of the area and sides of 3:4 to 4:3, resized, perhaps its mirror image (Szegedy et al.
    2015); without `random` the middle, 7/8 of the shorter side.
    """
    height, width = x_CHW.shape[1:]
    if random is None:
        side = round(min(height, width) * 7 / 8)
        return _crop(x_CHW, side, side, 0.5, 0.5, size)
    area, shape, down, right = torch.rand(4, generator=random).tolist()
    area, ratio = height * width * (0.08 + 0.92 * area), (4 / 3) ** (2 * shape - 1)
    sides = min(height, round((area / ratio) ** 0.5)), min(width, round((area * ratio) ** 0.5))
    return _flipped(_crop(x_CHW, *sides, down, right, size), random)


def _crop(x_CHW: Tensor, height: int, width: int, down: float, right: float, size: int) -> Tensor:
    """One of this height and width, resized; down and right: where it lies, 0 to 1."""
    height, width = max(height, 1), max(width, 1)
    top, left = round(down * (x_CHW.shape[1] - height)), round(right * (x_CHW.shape[2] - width))
    return _resized(x_CHW[:, top : top + height, left : left + width], size)


View = Callable[[Tensor, torch.Generator | None], Tensor]
"""How an image [3, H, W] becomes one of the network's size, uint8 both; without a generator it is not augmented."""
VIEWS: dict[str, Callable[[int, Tensor, torch.Generator | None], Tensor]] = {"padded": padded, "scaled": scaled}
"""By name, from the size."""


def _resized(x_CHW: Tensor, size: int) -> Tensor:
    made = functional.interpolate(x_CHW[None].float(), (size, size), mode="bilinear", antialias=True)[0]
    return made.round().clamp(0, 255).to(torch.uint8)


def _flipped(x_CHW: Tensor, random: torch.Generator) -> Tensor:
    return x_CHW.flip(2) if float(torch.rand((), generator=random)) < 0.5 else x_CHW


# ------------------------------------------------------------------------------------------------ images by class


@final
@dataclass(frozen=True)
class Part(Dataset[Any]):
    """Encoded images and their classes; an item's key is its place and what it is augmented by (or TEST)."""

    pictures: Pictures
    classes: Sequence[int]
    view: View

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        place, seed = key
        try:
            image = decode(self.pictures.encoded(place))
        except Unreadable as error:
            raise InputError(
                f"{self.pictures.name(place)} cannot be read ({error}); replace it or remove it"
            ) from error
        random = None if seed == TEST else torch.Generator().manual_seed(seed)
        return self.view(torch.from_numpy(np.array(image)).permute(2, 0, 1), random), self.classes[place]

    def __len__(self) -> int:
        return len(self.classes)

    def epoch(self, random: torch.Generator, batch: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented, in a new order; whatever the number of workers, the images are the same."""
        order = torch.randperm(len(self), generator=random).tolist()
        seeds = torch.randint(2**62, (len(self),), generator=random).tolist()
        return self._batches(list(zip(order, seeds, strict=True)), batch, workers)

    def plain(self, batch: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """In order, as they are."""
        return self._batches([(place, TEST) for place in range(len(self))], batch, workers)

    def _batches(self, keys: list[tuple[int, int]], batch: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 [n, 3, H, W] and classes [n]."""
        loader: DataLoader[Any] = DataLoader(
            self, batch, sampler=keys, num_workers=workers, collate_fn=_stacked, generator=torch.Generator()
        )
        for images, classes in loader:
            yield torch.from_numpy(images), torch.tensor(classes)


@final
@dataclass(frozen=True)
class Drawn(Pictures):
    """Noise around a grey of its class's own, in place of images: what a smoke run looks at."""

    classes: Sequence[int]
    size: int

    def __len__(self) -> int:
        return len(self.classes)

    def name(self, place: int) -> str:
        return f"drawn image {place}"

    def encoded(self, place: int) -> bytes:
        noise = np.random.default_rng(place).integers(0, 128, (self.size, self.size, 3)) + 127 * self.classes[place]
        file = io.BytesIO()
        Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
        return file.getvalue()


@final
@dataclass(frozen=True)
class Album:
    """Number of classes, what is trained on and what is judged on."""

    classes: int
    train: Part
    test: Part

    @classmethod
    def drawn(cls, count: int, size: int, view: View) -> Album:
        """Two classes of noise, the same in both parts."""
        classes = [place % 2 for place in range(count)]
        part = Part(Drawn(classes, size), classes, view)
        return cls(2, part, part)

    @classmethod
    def read(cls, material: Material, name: str, view: View) -> Album:
        """From NAME/train/CLASS/IMAGE and NAME/val/CLASS/IMAGE. Raises InputError when there are none, or the classes
        of val are others.
        """
        folder = _folder(material, name)
        found = {part: _paths(folder / part) for part in ("train", "val")}
        names = {part: sorted({path.partition("/")[0] for path in paths}) for part, paths in found.items()}
        if not names["train"] or names["train"] != names["val"]:
            raise InputError(
                f"{folder} has images of {len(names['train'])} classes in train/ and of {len(names['val'])} in val/; "
                "train/CLASS/IMAGE and val/CLASS/IMAGE with the same classes are expected"
            )
        number = {one: index for index, one in enumerate(names["train"])}
        parts = {
            part: Part(Files(folder / part, paths), [number[path.partition("/")[0]] for path in paths], view)
            for part, paths in found.items()
        }
        return cls(len(number), parts["train"], parts["val"])


def _folder(material: Material, name: str) -> Path:
    folder = material.folder / name if material.folder else None
    if folder is None or not folder.is_dir():
        where = f"{material.folder} has no {name}/" if material.folder else "no folder of data was named"
        tree = f"DIR/{name}/train/CLASS/IMAGE and DIR/{name}/val/CLASS/IMAGE are"
        raise InputError(f"the images of {name} are needed and {where}; --data DIR, where {tree}")
    return folder


def _paths(folder: Path) -> list[str]:
    """CLASS/IMAGE, sorted; hidden ones are left out."""
    found = (path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _stacked(items: list[tuple[Tensor, int]]) -> tuple[Any, list[int]]:
    """As numpy arrays: tensors would come through shared memory, of which containers have 64 MB."""
    images, classes = zip(*items, strict=True)
    return torch.stack(images).numpy(), list(classes)
