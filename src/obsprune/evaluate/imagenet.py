"""Image classification: top-1 and top-5 accuracy and cross-entropy, image by image; the protocol goes with them.

`top1` and `top5` are percentages of right answers; `top1_err` and `top5_err` are 100 minus these, as in the results of
timm's validate.py, whose further keys (param_count, img_size, crop_pct, interpolation) are used, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from obsprune.errors import InputError, ObspruneError
from obsprune.evaluate.task import Scored, Task
from obsprune.models.images import ImageSamples, ImageSource, Labels, some
from obsprune.models.load import Model, suitable
from obsprune.models.pixels import Damage, preprocessing
from obsprune.progress import Progress

BATCH = 32
"""Images of one forward; a few such batches are decoded ahead."""
NAMED = 20
"""Damaged images that a report names."""


@dataclass(frozen=True)
class ImageNetTask(Task):
    """Images with a class each."""

    name: str
    samples: ImageSamples
    protocol: dict[str, Any]
    metric = "top1"

    @property
    def material(self) -> str:
        return self.samples.bytes_hash()

    def score(self, model: Model, progress: Progress, who: str) -> Scored:
        """Raises ObspruneError when logits are not finite, InputError when no image can be decoded."""
        mine = model.ranks.mine(len(self.samples))
        stream = self.samples.take(mine).stream(BATCH)
        classes = torch.tensor(self.samples.classes)[list(mine)]
        own: list[tuple[int, int, float]] = []
        progress.stage(f"{self.name}, {who}", len(stream))
        began = time.perf_counter()
        with model.loaded(), torch.no_grad(), suitable(model):
            for indices, pixels in stream:
                logits = model.network(pixel_values=pixels.to(model.device, model.dtype)).logits.float()
                rank, loss = judge(logits, classes[indices].to(logits.device))
                own += zip((mine[index] for index in indices), rank.tolist(), loss.tolist(), strict=True)
                progress.detail(f"{model.ranks.size * len(own) / (time.perf_counter() - began):.0f} images/s")
                progress.step()
        judged = sorted(one for part in model.ranks.gather(own) for one in part)
        damaged = [one for part in model.ranks.gather(stream.damaged) for one in part]
        if not judged:
            raise InputError(f"none of {len(self.samples):,} images of {self.name} can be read: {some(damaged)}")
        ranks, losses = [rank for _, rank, _ in judged], [loss for _, _, loss in judged]
        speed = {"images_per_second": round(len(ranks) / (time.perf_counter() - began), 1)}
        values = {"metric": self.metric, **_metrics(ranks, losses), **_facts(model, damaged), **speed}
        items = {"top1": [100.0 * (rank == 0) for rank in ranks], "cross_entropy": losses}
        return Scored({**self.protocol, **values}, items)


def imagenet_task(name: str, samples_source: ImageSource, labels: Labels, limit: int | None) -> ImageNetTask:
    """All images of the source in their order, or `limit` of them evenly spaced, since trees are sorted by class.

    Raises InputError when an image has no class that the model knows.
    """
    every = samples_source.every()
    samples = every if limit is None or limit >= len(every) else every.take(spaced(len(every), limit))
    samples.labelled(name, "accuracy", "--task")
    return ImageNetTask(name, samples, _protocol(samples, len(every), labels))


def spaced(count: int, limit: int) -> list[int]:
    """`limit` of `count` places at equal distances, the first among them. Raises InputError below 1."""
    if limit < 1:
        raise InputError(f"{limit} images cannot be evaluated; give a limit of 1 or more")
    return [place * count // limit for place in range(limit)]


def judge(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image, how many classes come before the right one, and its cross-entropy in nats; logits [n, classes].

    Ties go to the lower index, on every device. Raises ObspruneError when a logit is not finite.
    """
    if not bool(logits.isfinite().all()):
        raise ObspruneError("the model's logits are not finite; evaluate in a wider type (--dtype float32)")
    own = logits.gather(1, classes[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < classes[:, None]
    ranks = ((logits > own) | ((logits == own) & lower)).sum(1)
    return ranks, functional.cross_entropy(logits, classes, reduction="none")


def _metrics(ranks: Sequence[int], losses: Sequence[float]) -> dict[str, Any]:
    loss, loss_stderr = _mean(losses)
    return {
        **_accuracy("top1", sum(rank < 1 for rank in ranks), len(ranks)),
        **_accuracy("top5", sum(rank < 5 for rank in ranks), len(ranks)),
        "cross_entropy": loss,
        "cross_entropy_stderr": loss_stderr,
        "images": len(ranks),
    }


def _accuracy(name: str, hits: int, count: int) -> dict[str, float]:
    """A proportion, what it lacks to all, and the standard error of both; in percent."""
    share = hits / count
    stderr = 100 * math.sqrt(share * (1 - share) / count)
    return {name: 100 * hits / count, f"{name}_err": 100 * (count - hits) / count, f"{name}_stderr": stderr}


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """A mean and its standard error, 0 for a single value, which has none."""
    every = torch.tensor(values, dtype=torch.float64)
    spread = float(every.std()) if len(values) > 1 else 0.0
    return float(every.mean()), spread / math.sqrt(len(values))


def _facts(model: Model, damaged: Sequence[Damage]) -> dict[str, Any]:
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    return {
        "damaged_images": len(damaged),
        "damaged": {"count": len(damaged), "names": [str(damage) for damage in damaged[:NAMED]]},
        "param_count": round(parameters / 1e6, 2),
    }


def _protocol(samples: ImageSamples, available: int, labels: Labels) -> dict[str, Any]:
    chosen = "all" if len(samples) == available else f"{len(samples)} of {available}, evenly spaced"
    return {
        **samples.facts(),
        "chosen": chosen,
        "labels": samples.layout.rule,
        "classes": labels.count,
        "class_offset": labels.offset,
        "img_size": samples.size[1],
        **preprocessing(samples.processor),
        "sha256": _content_hash(samples),
    }


def _content_hash(samples: ImageSamples) -> str:
    """SHA-256 over the images, their preprocessing and their classes."""
    return hashlib.sha256(json.dumps([samples.content_hash(), samples.classes]).encode()).hexdigest()
