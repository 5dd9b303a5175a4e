"""Pretrained models that gRDA is tried on as an optimizer for sparse fine-tuning: opened, trained and judged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from obsprune.core.losses import perplexity
from obsprune.engine.curvature import ASKED, Trainee
from obsprune.engine.retrained import Blocks, labelled, trained, trainee_of
from obsprune.engine.training import Masks
from obsprune.errors import InputError
from obsprune.models.images import ImageSamples
from obsprune.models.kinds import Wish
from obsprune.models.load import Model, load
from obsprune.models.matrices import differentiated
from obsprune.models.samples import Batch
from obsprune.studies.material import Material

JUDGED = 64
"""Sequences or images of one forward when a model is judged."""


@dataclass(frozen=True)
class Patient:
    """An opened model: its blocks are trained, `judge` says how good it is on what it was not trained on."""

    trainee: Trainee
    train: Sequence[Batch]
    judge: Callable[[], float]

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        """The batches in a new order."""
        for index in torch.randperm(len(self.train), generator=generator).tolist():
            yield self.train[index]

    @property
    def zeros(self) -> float:
        """Share of exact zeros among the weights of all matrices."""
        gone = sum(int((matrix.tensor == 0).sum()) for matrix in self.trainee.matrices)
        return gone / self.trainee.size

    def masks(self) -> Masks:
        """Of what is not zero, by matrix."""
        return {matrix.name: matrix.turn(matrix.weight) != 0 for matrix in self.trainee.matrices}

    def layers(self) -> list[float]:
        """The same of each matrix, in order."""
        return [float((matrix.tensor == 0).double().mean()) for matrix in self.trainee.matrices]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While open, weights may be changed; afterwards they are what they were."""
        weights = {one: one.detach().clone() for one in self.trainee.network.parameters()}
        try:
            yield
        finally:
            with torch.no_grad():
                for one, before in weights.items():
                    one.copy_(before)


class Subject(ABC):
    """metric: what `judge` gives. directory, needs: below the data's folder."""

    metric: str
    directory: str
    needs: Sequence[str]

    def require(self, material: Material) -> None:
        """Raises InputError for a file that is missing."""
        for name in self.needs:
            material.require(name, f"what {self.directory} is trained and judged on")

    @contextmanager
    def opened(self, material: Material, count: int, judged: int, batch: int, seed: int) -> Iterator[Patient]:
        """count: sequences or images to train on, drawn with the seed; judged: to judge by."""
        weights = material.require(f"{self.directory}/model.safetensors", f"the model {self.directory}")
        model = load(str(weights.parent), dtype="float32", device="cpu")
        with model.loaded(), differentiated(trained(model)):
            yield self.patient(model, material, count, judged, batch, torch.Generator().manual_seed(seed))

    @abstractmethod
    def patient(
        self, model: Model, material: Material, count: int, judged: int, batch: int, random: torch.Generator
    ) -> Patient:
        """Of a model whose weights are in memory."""


@final
@dataclass(frozen=True)
class Stories(Subject):
    """A language model, by the loss of its next tokens; rows of `seqlen` tokens."""

    directory: str = "stories260k"
    train: str = "text/tinystories-calibration.txt"
    test: str = "text/tinystories-evaluation.txt"
    seqlen: int = 256
    metric = "perplexity"

    @property
    def needs(self) -> Sequence[str]:  # type: ignore[override]
        return (f"{self.directory}/model.safetensors", self.train, self.test)

    def patient(
        self, model: Model, material: Material, count: int, judged: int, batch: int, random: torch.Generator
    ) -> Patient:
        paths = [material.require(name, "its text") for name in (self.train, self.test)]
        train, test = (model.open(Wish(str(path), self.seqlen))[0] for path in paths)
        rows = train.sample(count, random)
        batches = model.batches(rows.take(range(min(count, len(rows)))), batch)
        others = model.batches(test.every().take(range(judged)), JUDGED)  # type: ignore[attr-defined]
        trainee = Trainee(
            Blocks(model, False),
            model.matrices,
            lambda one: model.network(input_ids=one["input_ids"]).logits,
            next_tokens,
        )
        return Patient(trainee, [with_labels(one) for one in batches], lambda: _perplexity(trainee, others))


@final
@dataclass(frozen=True)
class Images(Subject):
    """An image classifier, by its labels: top-1 accuracy in percent."""

    directory: str = "deit-tiny"
    labels: str = "imagenet-sample/labels.tsv"
    metric = "top-1, %"

    @property
    def needs(self) -> Sequence[str]:  # type: ignore[override]
        return (f"{self.directory}/model.safetensors", self.labels)

    def patient(
        self, model: Model, material: Material, count: int, judged: int, batch: int, random: torch.Generator
    ) -> Patient:
        source, _ = model.open(Wish(f"imagenet={material.require(self.labels, 'its images')}", 0))
        found = source.sample(count + judged, random)
        assert isinstance(found, ImageSamples)
        if len(found) < count + judged:
            raise InputError(f"{len(found)} images are there and {count} + {judged} are asked for; fewer are expected")
        train, test = found.take(range(count)), found.take(range(count, count + judged))
        trainee = trainee_of(model, torch.float32, False)
        parts, others = (labelled(part, size, model.device) for part, size in ((train, batch), (test, JUDGED)))
        return Patient(trainee, parts, lambda: _top1(trainee, others))


SUBJECTS: dict[str, Subject] = {"stories260k": Stories(), "deit-tiny": Images()}


def with_labels(batch: Batch) -> Batch:
    """Text is asked for itself."""
    return {**batch, ASKED: batch["input_ids"]}


def next_tokens(z_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """The mean loss of the next tokens, in nats."""
    return functional.cross_entropy(z_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


@torch.no_grad()
def _perplexity(trainee: Trainee, batches: Sequence[Batch]) -> float:
    losses = [float(next_tokens(trainee.logits(one), one["input_ids"])) * len(one["input_ids"]) for one in batches]
    return perplexity(math.fsum(losses) / sum(len(one["input_ids"]) for one in batches))


@torch.no_grad()
def _top1(trainee: Trainee, batches: Sequence[Batch]) -> float:
    right = sum(int((trainee.logits(one).argmax(1) == one[ASKED]).sum()) for one in batches)
    return 100 * right / sum(len(one[ASKED]) for one in batches)
