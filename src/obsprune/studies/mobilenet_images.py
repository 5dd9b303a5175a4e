"""The images of the studies on MobileNetV1: some to calibrate with, and others to judge by."""

from __future__ import annotations

import shutil
from pathlib import Path

from obsprune.evaluate.imagenet import spaced
from obsprune.models.images import ImageSamples, ImageSource
from obsprune.models.kinds import Wish
from obsprune.models.load import Model

LABELS = "imagenet-sample/labels.tsv"
SUFFIX = ".jpg"
"""Of a copied image, whatever it is: what reads it goes by its bytes."""


def two_parts(model: Model, sources: tuple[Path, Path], counts: tuple[int, int]) -> tuple[ImageSamples, ImageSamples]:
    """At most so many images of each source, to calibrate and to evaluate, at even distances. Of one source for both
    two of every five images are for the first, and the others for the second. Raises InputError.
    """
    first, second = (_every(model, source) for source in sources)
    if sources[0] == sources[1]:
        first, second = (
            first.take([place for place in range(len(first)) if (place % 5 < 2) == seen]) for seen in (True, False)
        )
    return _some(first, counts[0]), _some(second, counts[1])


def _every(model: Model, source: Path) -> ImageSamples:
    found, _ = model.open(Wish(f"imagenet={source}", 0))
    assert isinstance(found, ImageSource)
    return found.every()


def _some(samples: ImageSamples, count: int) -> ImageSamples:
    return samples.take(spaced(len(samples), min(count, len(samples))))


def copied(samples: ImageSamples, folder: Path) -> Path:
    """The images by themselves in a folder of their own, as they are encoded and without a class, in their order."""
    shutil.rmtree(folder, ignore_errors=True)  # a stopped run may have left others there
    folder.mkdir()
    for number, place in enumerate(samples.places):
        (folder / f"{number:06d}{SUFFIX}").write_bytes(samples.layout.pictures.encoded(place))
    return folder
