"""Images to calibrate and to evaluate on: folders, labels files, data sets; drawn with a seed, hashed.

Whatever the layout, an image is its encoded bytes (`pixels.py`): nothing is decoded until it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from obsprune.errors import InputError
from obsprune.models.labels import Labels
from obsprune.models.layouts import Layout, find_layout
from obsprune.models.pixels import (
    Array,
    Damage,
    decode,
    each,
    load_processor,
    output_size,
    pixels,
    settings,
)
from obsprune.models.samples import Batch, Samples, Source

__all__ = ["ImageSamples", "ImageSource", "Labels", "Stream", "load_processor", "open_images", "some"]

CHUNK = 16
"""Images of one message of a worker process."""
TOLD = 5
"""Damaged images that a sentence names."""


@final
@dataclass(frozen=True)
class ImageSamples(Samples):
    """Images of a source, by their places in it; each is read and decoded when it is used."""

    name: str
    layout: Layout
    processor: Any = field(repr=False)
    places: Sequence[int] = field(repr=False)
    unit = "images"

    def __len__(self) -> int:
        return len(self.places)

    def take(self, indices: Sequence[int]) -> ImageSamples:
        return replace(self, places=[self.places[index] for index in indices])

    def batches(self, size: int, device: torch.device) -> list[Batch]:
        """All of them decoded, [{"pixel_values": float32 [n, 3, H, W]}]. Raises InputError for a damaged one."""
        stream = self.stream(size)
        parts = [{"pixel_values": part.to(device)} for _, part in stream]
        if stream.damaged:
            raise InputError(
                f"{len(stream.damaged):,} of {len(self):,} images of {self.name} cannot be read: {some(stream.damaged)}"
            )
        return parts

    def stream(self, size: int) -> Stream:
        """Batches of at most `size` decoded images, for as many as there may be."""
        return Stream(self, size)

    def content_hash(self) -> str:
        """SHA-256 over the processor's settings and the images' encoded bytes, in order."""
        told = json.dumps(settings(self.processor), sort_keys=True) + self.bytes_hash()
        return hashlib.sha256(told.encode()).hexdigest()

    def bytes_hash(self) -> str:
        """SHA-256 over the images' encoded bytes alone."""
        total = hashlib.sha256()
        for chunk in each(self.layout.pictures, self.places, _digest, CHUNK):
            total.update(b"".join(_digest(b"") if isinstance(digest, Damage) else digest for digest in chunk))
        return total.hexdigest()

    def facts(self) -> dict[str, Any]:
        split = {"split": self.layout.split} if self.layout.split else {}
        return {"dataset": self.name, **split, "images": len(self), "size": list(self.size)}

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model is given."""
        return output_size(self.processor)

    @property
    def classes(self) -> list[int | None]:
        """The model's index for the class of each, None where it is unknown."""
        return [self.layout.classes[place] for place in self.places]

    def labelled(self, name: str, purpose: str, flag: str) -> list[int]:
        """`classes`, none of them unknown. Raises InputError that says what needs them, and which flag can help."""
        known = [index for index in self.classes if index is not None]
        unknown = len(self) - len(known)
        if unknown:
            raise InputError(
                f"{name}: {unknown:,} of {len(self):,} images have no class of the model's, and {purpose} needs them: "
                f"{self.layout.rule} ({flag} imagenet=FILE)"
            )
        return known

    def others(self) -> ImageSamples:
        """All images of the source that are not among these, in its order."""
        taken = set(self.places)
        return replace(self, places=[place for place in range(len(self.layout.pictures)) if place not in taken])

    @property
    def positions(self) -> int:
        return 1

    @property
    def together(self) -> int:
        return 32


def _digest(encoded: bytes) -> bytes:
    return hashlib.sha256(encoded).digest()


def _checked(encoded: bytes) -> None:
    decode(encoded)


def _made(processor: Any, encoded: bytes) -> Array:
    return pixels(processor, decode(encoded))


class Stream:
    """Batches of decoded images, (their indices among the samples, pixel_values float32 [n, 3, H, W] on the CPU), made
    ahead by worker processes, never all at once. damaged: the images that were left out so far.
    """

    def __init__(self, samples: ImageSamples, size: int) -> None:
        self.samples, self.size = samples, size
        self.damaged: list[Damage] = []

    def __len__(self) -> int:
        return -(-len(self.samples) // self.size)

    def __iter__(self) -> Iterator[tuple[list[int], Tensor]]:
        self.damaged.clear()
        work, start = partial(_made, self.samples.processor), 0
        for good, made, damaged in each(self.samples.layout.pictures, self.samples.places, work, self.size, _stacked):
            self.damaged += damaged
            if good:
                yield [start + index for index in good], torch.from_numpy(made)
            start += len(good) + len(damaged)


def _stacked(chunk: list[Array | Damage]) -> tuple[list[int], Array, list[Damage]]:
    """The places of the images that could be decoded, these as one array, and the damaged ones."""
    good = {place: made for place, made in enumerate(chunk) if not isinstance(made, Damage)}
    damaged = [made for made in chunk if isinstance(made, Damage)]
    return list(good), np.stack(list(good.values())) if good else np.empty(0, np.float32), damaged


def some(damaged: Sequence[Damage]) -> str:
    """The first few by name, and how many more there are."""
    more = f", and {len(damaged) - TOLD:,} more" if len(damaged) > TOLD else ""
    return ", ".join(map(str, damaged[:TOLD])) + more


@final
@dataclass
class ImageSource(Source):
    """Images to draw from. What was looked at and what was damaged is remembered for `notices`."""

    name: str
    everything: ImageSamples
    _tried: set[int] = field(default_factory=set, repr=False)
    _damaged: dict[int, Damage] = field(default_factory=dict, repr=False)

    def every(self) -> ImageSamples:
        """All images in their order, damaged ones too: nothing has been decoded."""
        return self.everything

    def sample(self, needed: int, generator: torch.Generator, more: int = 0) -> ImageSamples:
        """Images in random order, each decoded once to see that it can be; damaged ones are left out.

        Raises InputError when none can be decoded.
        """
        order = torch.randperm(len(self.everything), generator=generator).tolist()
        found = self.everything.take(list(islice(self._good(order, needed + more), needed + more)))
        if not len(found):
            raise InputError(f"none of {self._count(self._damaged)} can be read: {some(list(self._damaged.values()))}")
        return found

    def _good(self, order: list[int], expected: int) -> Iterator[int]:
        shuffled, indices = self.everything.take(order), iter(order)
        for chunk in each(shuffled.layout.pictures, shuffled.places, _checked, CHUNK, expected=expected):
            for index, result in zip(islice(indices, len(chunk)), chunk, strict=True):
                self._tried.add(index)
                if isinstance(result, Damage):
                    self._damaged[index] = result
                else:
                    yield index

    def notices(self) -> list[str]:
        if not self._damaged:
            return []
        named = [damage for _, damage in sorted(self._damaged.items())]
        return [f"{len(named):,} of {self._count(self._tried)} cannot be read and are left out: {some(named)}"]

    def _count(self, indices: Collection[int]) -> str:
        return f"{len(indices):,} images of {self.name}"


def open_images(source: str, processor: Any, labels: Labels, split: str = "train") -> ImageSource:
    """A folder of images; a folder with a folder for each class; a labels file (.tsv, .csv, .txt: see `read_labels`); a
    folder written by `save_to_disk`; or the id of a data set on the hub. split: of those that have some, folders too.

    Classes that the model does not know raise where a labels file tells them. Elsewhere they are None, as calibration
    needs none, and the layout's `rule` says why. Raises InputError with the way out for all that is no such source.
    """
    layout = find_layout(source, labels, split)
    everything = ImageSamples(source, layout, processor, range(len(layout.pictures)))
    _ = everything.size  # a processor that cannot be used is refused here
    return ImageSource(source, everything)
