"""Pruning with retraining of a checkpoint's blocks (engine/training.py): each step is committed, and a stopped run goes
on after the last whole one, to the same bytes: a step depends on the weights before it, the seed and its number alone.

All weights inside the blocks are trained, in float32. What is outside the blocks is frozen, and in evaluation mode:
no running statistic that moves could be stored there, and some heads drop nearly everything while they train
(MobileNetV1: 99.9 %). Batch norms keep their statistics unless told otherwise: those folded into weights have none, and
those of MobileNets from TensorFlow have a momentum that means the opposite in torch (0.9997: all of the last batch).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from obsprune.core.optimizers import cosine
from obsprune.engine.curvature import ASKED, Trainee, gradients
from obsprune.engine.norms import batch_norms
from obsprune.engine.rundir import Event, RunDir
from obsprune.engine.training import Criterion, Masks, Retraining
from obsprune.errors import InputError
from obsprune.models.blocks import Block
from obsprune.models.checkpoint import read_headers, read_tensors, write_shard
from obsprune.models.images import ImageSamples
from obsprune.models.load import Model, suitable
from obsprune.models.matrices import Matrix, differentiated
from obsprune.models.pixels import Damage
from obsprune.models.samples import Batch
from obsprune.progress import Progress

KEEP = "keep:"
"""Before a matrix's name, in a file of a step: its mask."""


@dataclass(frozen=True)
class Course:
    """criterion: which weights go; sparsities: after each step; epochs: of each step, at the rate `lr` of Adam, which
    falls to 0 along a cosine; batch_size: images at most; moving: whether batch norms normalise by the batch and gather
    new statistics while they train; seed: of the images' order and of dropout.
    """

    criterion: Criterion
    sparsities: Sequence[float]
    epochs: int
    lr: float
    batch_size: int
    moving: bool
    seed: int

    def updates(self, images: int) -> int:
        """Optimizer steps of the whole course."""
        return len(self.sparsities) * self.epochs * -(-images // self.batch_size)


@final
class Shuffled:
    """Labelled images in batches of nearly equal sizes, in a new order each time. damaged: what was left out."""

    def __init__(self, samples: ImageSamples, most: int, device: torch.device, seed: int, watch: Progress) -> None:
        self.samples, self.device, self.watch = samples, device, watch
        self.generator = torch.Generator().manual_seed(seed)
        self.count = -(-len(samples) // most)
        self.size = -(-len(samples) // self.count)  # not `most`: a last batch of one image upsets batch norms
        self.damaged: dict[str, Damage] = {}

    def __call__(self) -> Iterator[Batch]:
        shuffled = self.samples.take(torch.randperm(len(self.samples), generator=self.generator).tolist())
        classes, stream, done = torch.tensor(shuffled.classes), shuffled.stream(self.size), 0
        for indices, pixels in stream:
            yield {"pixel_values": pixels.to(self.device), ASKED: classes[indices].to(self.device)}
            done += len(indices)
            self.watch.detail(f"{done:,} of {len(self.samples):,} images")
        self.damaged |= {damage.name: damage for damage in stream.damaged}


def labelled(samples: ImageSamples, size: int, device: torch.device) -> list[Batch]:
    """All of them in batches, decoded and kept. Raises InputError for one without a class, or that is damaged."""
    classes = torch.tensor(samples.labelled(samples.name, "training", "--dataset"), device=device)
    parts = zip(samples.batches(size, device), torch.split(classes, size), strict=True)
    return [{**batch, ASKED: own} for batch, own in parts]


@final
class Blocks(nn.ModuleList):
    """The blocks of a model, which alone are ever in training mode; their batch norms only where they are `moving`."""

    def __init__(self, model: Model, moving: bool) -> None:
        super().__init__(block.module for block in model.blocks)
        self.moving = moving

    def train(self, mode: bool = True) -> Blocks:
        super().train(mode)
        for norm in batch_norms(self):
            norm.train(mode and self.moving)
        return self


def trainee_of(model: Model, compute: torch.dtype, moving: bool) -> Trainee:
    """The model, whose blocks are loaded, as something to train. compute: dtype of the forward passes."""

    def logits(batch: Batch) -> Tensor:
        with suitable(model), torch.autocast(model.device.type, compute, enabled=compute != torch.float32):
            found: Tensor = model.network(pixel_values=batch["pixel_values"]).logits
        return found.float()

    return Trainee(Blocks(model, moving), model.matrices, logits)


def check_training(model: Model, compute: torch.dtype, batch: Batch) -> None:
    """Sends one small batch through the dense model and back. Raises InputError where that cannot be."""
    with model.loaded(), differentiated(trained(model)):
        for name, gradient in gradients(trainee_of(model, compute, False), batch).items():
            if not bool(gradient.isfinite().all()):
                raise InputError(f"the dense model's gradient of {name} is not finite; the checkpoint is damaged")


def trained(model: Model) -> list[nn.Parameter]:
    """All weights inside the blocks, which must be loaded."""
    return [p for block in model.blocks for p in block.module.parameters() if p.is_floating_point()]


@dataclass(frozen=True)
class Retrained:
    """The run of a course. scored: what scores are measured on; images: what is trained on."""

    model: Model
    course: Course
    compute: torch.dtype
    scored: Callable[[], Sequence[Batch]]
    images: ImageSamples
    run: RunDir
    progress: Progress

    def __call__(self) -> None:
        """Prunes and retrains, and commits all blocks. What the run directory knows is not done again."""
        model, run = self.model, self.run
        if all(run.committed(block.name) for block in model.blocks):
            return
        with model.loaded(), differentiated(trained(model)):
            self._steps(trainee_of(model, self.compute, self.course.moving))
            for block in model.blocks:
                run.commit(block.name, block.tensors(), [outcome(matrix) for matrix in block.matrices], 0.0)

    def _steps(self, trainee: Trainee) -> None:
        last = self.run.recorded("step")
        done: int = last["number"] if last else 0
        masks = restore(self.run.iterate(done), self.model.blocks) if done else {}
        total = len(self.course.sparsities)
        self.progress.stage("pruning and retraining", (total - done) * max(self.course.epochs, 1))
        scored = self.scored() if done < total else []
        for number in range(done + 1, total + 1):
            masks, event = self._step(trainee, number, masks, scored)
            self.progress.line(describe(event, total))

    def _step(self, trainee: Trainee, number: int, masks: Masks, scored: Sequence[Batch]) -> tuple[Masks, Event]:
        course, begin = self.course, time.perf_counter()
        seed, sparsity = seed_of(course.seed, number), course.sparsities[number - 1]
        images = Shuffled(self.images, course.batch_size, self.model.device, seed, self.progress)
        optimizer = partial(torch.optim.Adam, lr=course.lr)
        retraining = Retraining(images, optimizer, course.epochs, cosine, trained(self.model), images.count)
        with seeded(seed, self.model.device):
            self.progress.detail(f"step {number}: scores")
            masks = course.criterion.prune(trainee, masks, sparsity, scored)
            loss = retraining(trainee, masks, self.progress.step)
        facts = {"loss": loss if course.epochs else None, "seconds": time.perf_counter() - begin}
        save(self.run.iterate(number), self.model.blocks, masks)
        told = [str(damage) for _, damage in sorted(images.damaged.items())]
        event = self.run.record("step", number=number, sparsity=sparsity, **facts, damaged=told)
        self.run.forget({number})
        return masks, event


def seed_of(seed: int, number: int) -> int:
    """The seed of one step, whatever steps were before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While open, dropout depends on this seed alone; the global generators are as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def save(folder: Path, blocks: Sequence[Block], masks: Masks) -> None:
    """Writes all that a block is, a file each: weights in float32, statistics and counters of norms, masks."""
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        state = {name: tensor.detach().cpu() for name, tensor in block.module.state_dict().items()}
        keep = {f"{KEEP}{matrix.name}": masks[matrix.name].cpu() for matrix in block.matrices}
        write_shard(folder / f"{block.name}.safetensors", state | keep)


def restore(folder: Path, blocks: Sequence[Block]) -> Masks:
    """Puts into the loaded blocks what `save` has written; returns the masks."""
    masks: dict[str, Tensor] = {}
    for block in blocks:
        path = folder / f"{block.name}.safetensors"
        tensors = read_tensors(path, read_headers(path))
        for matrix in block.matrices:
            masks[matrix.name] = tensors.pop(f"{KEEP}{matrix.name}").to(matrix.device)
        block.module.load_state_dict(tensors)
    return masks


def outcome(matrix: Matrix) -> Event:
    """What became of a matrix, as it is stored."""
    weight = matrix.read()
    zeros = int((weight == 0).sum())
    return {"name": matrix.name, "shape": list(weight.shape), "zeros": zeros, "sparsity": zeros / weight.numel()}


def describe(event: Event, total: int) -> str:
    """One line about a step."""
    loss = "" if event["loss"] is None else f", training loss {event['loss']:.4f}"
    found = f"step {event['number']} of {total}: sparsity {event['sparsity']:.4f}{loss}, {event['seconds']:.1f} s"
    damaged = event["damaged"]
    return f"{found}; {len(damaged):,} images cannot be read and are left out" if damaged else found
