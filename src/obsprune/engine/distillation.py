"""Fine-tuning of a sparse model: all its weights but the zeros move, toward the dense model's answers (Hinton et al.
2015), toward the text, or both.

A run goes on from what it has written last, to the same bytes: a step depends on the weights and moments before it, the
seed and its number alone. How often it is written depends on the clock, and changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obsprune.core.losses import divergence, log_probabilities
from obsprune.core.optimizers import cosine
from obsprune.engine.dealing import total
from obsprune.engine.norms import batch_norms
from obsprune.engine.retrained import seed_of, seeded
from obsprune.engine.rundir import Event, RunDir
from obsprune.engine.training_state import Saved, restore, save
from obsprune.errors import InputError, ObspruneError
from obsprune.models.accelerated import Accelerated, accelerated, trainable
from obsprune.models.kinds import Kind
from obsprune.models.load import Model, suitable
from obsprune.models.samples import Batch, Samples
from obsprune.models.sparse_training import keep_sparse
from obsprune.progress import Progress

LOGIT_BYTES = 2**30
"""Float32 logits of one forward stay under this."""
SAVE_SECONDS, SAVE_TIMES = 30.0, 20
"""What a run loses at most when it is killed, and one step: so long, or so many times what writing the state takes."""


@dataclass(frozen=True)
class Course:
    """steps, each on `batch_size` samples of all processes together, `at_once` in a forward of each; lr: the highest
    rate, after the share `warmup` of the steps; distill: share of the divergence, at a temperature, in the loss; decay,
    clip: weight decay, the longest gradient; every: steps between two looks at what is held out; seed: of the order,
    and of dropout.
    """

    steps: int
    batch_size: int
    at_once: int | str
    lr: float
    warmup: float
    distill: float
    temperature: float
    decay: float
    clip: float
    every: int
    seed: int

    def rate(self, number: int) -> float:
        """The learning rate of a step; they count from 1."""
        rising = max(1, round(self.warmup * self.steps))
        if number <= rising:
            return self.lr * number / rising
        return self.lr * cosine((number - rising) / (self.steps - rising + 1))

    def order(self, count: int) -> list[int]:
        """Which of `count` samples come when: all of them in a new order, again and again."""
        needed, generator = self.steps * self.batch_size, torch.Generator().manual_seed(self.seed)
        epochs = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
        return torch.cat(epochs)[:needed].tolist()

    def due(self, number: int) -> bool:
        """Whether the model is judged after a step."""
        return number % self.every == 0 or number == self.steps

    def size(self, samples: Samples, classes: int) -> int:
        """Samples of one forward."""
        if isinstance(self.at_once, int):
            return self.at_once
        return max(1, min(samples.together, LOGIT_BYTES // (4 * samples.positions * classes)))

    def loss(self, kind: Kind, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """distill · τ² KL(dense ‖ sparse), both at temperature τ, + (1 − distill) · the model's own loss; means over
        their predictions. student, teacher: logits.
        """
        found = student.new_zeros(())
        if self.distill > 0:
            s, t = (log_probabilities(logits / self.temperature) for logits in (student, teacher))
            found = found + self.distill * self.temperature**2 * divergence(s, t) / kind.predictions(batch)
        if self.distill < 1:
            own, count = kind.loss(log_probabilities(student), log_probabilities(teacher), batch)
            found = found + (1 - self.distill) * own / count
        return found


def judged(run: RunDir) -> list[Event]:
    """What the held-out samples said, of the model as it was given (step 0) and after the steps that were due."""
    return [event for event in run.events if event["kind"] in ("begin", "step") and event["heldout"] is not None]


def best(run: RunDir) -> int:
    """The step after which the loss on what is held out was lowest."""
    return int(min(judged(run), key=lambda event: event["heldout"])["number"])


@dataclass(frozen=True)
class Distillation:
    """The run of a course. samples: what is trained on; heldout: what decides which step was best; teacher: None where
    nothing is distilled.
    """

    model: Model
    teacher: Model | None
    course: Course
    compute: torch.dtype
    checkpointing: bool
    samples: Samples
    heldout: Samples
    run: RunDir
    progress: Progress

    def __call__(self) -> Mapping[str, Tensor]:
        """Trains; the best step's weights by name, none where the model was best as it was given. What the run
        directory knows is not done again.
        """
        last = self.run.recorded("step")
        if last is None or last["number"] < self.course.steps:
            with self._ready() as trained, keep_sparse(trained.wrapped):
                self._train(trained)
        found = best(self.run)
        return Saved(self.run.iterate(found)) if found else {}

    @contextmanager
    def _ready(self) -> Iterator[Accelerated]:
        network = trainable(self.model, self.checkpointing)
        with self._taught():
            self._freeze(network)
            with accelerated(self.model, network, self.compute, self.course.decay) as trained:
                yield trained

    @contextmanager
    def _taught(self) -> Iterator[None]:
        if self.teacher is None:
            yield
        else:
            with self.teacher.loaded():
                yield

    def _freeze(self, network: nn.Module) -> None:
        """What no gradient reaches (a vision tower) is not trained. Raises InputError for a gradient that is not
        finite.
        """
        _learning(network)
        batch = self.model.kind.small(self.samples.take([0]).batches(1, self.model.device)[0])
        with seeded(self.course.seed, self.model.device):
            self._loss(network, batch).backward()  # type: ignore[no-untyped-call]
        for name, parameter in network.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise InputError(f"the gradient of {name} is not finite; the checkpoint is damaged")
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def _loss(self, network: Callable[..., Any], batch: Batch) -> Tensor:
        with suitable(self.model):
            student = network(**batch).logits
        return self.course.loss(self.model.kind, student, self._asked(batch, student), batch)

    @torch.no_grad()
    def _asked(self, batch: Batch, student: Tensor) -> Tensor:
        """What the teacher answers; without one, the student itself, of whom nothing depends on it."""
        if self.teacher is None:
            return student
        dtype = self.teacher.dtype
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
        answer: Tensor = self.teacher.network(**inputs).logits
        return answer.float()

    def _train(self, trained: Accelerated) -> None:
        course, run = self.course, self.run
        done = self._begin(trained)
        order, losses, began, most = course.order(len(self.samples)), list[float](), time.monotonic(), SAVE_SECONDS
        self.progress.stage("fine-tuning", course.steps - done)
        for number in range(done + 1, course.steps + 1):
            rows = order[(number - 1) * course.batch_size : number * course.batch_size]
            losses.append(self._step(trained, number, rows))
            now = time.monotonic() - began
            due = course.due(number)
            if due or run.ranks.told(lambda now=now, most=most: now >= most):  # type: ignore[misc]
                most = max(SAVE_SECONDS, SAVE_TIMES * self._keep(trained, number, losses, due, now))
                losses, began = [], time.monotonic()
            self.progress.step(self._said(number, losses))

    def _begin(self, trained: Accelerated) -> int:
        """How many steps are done already; the model is then as it was after them."""
        last = self.run.recorded("step")
        if last is not None:
            restore(self.run.iterate(last["number"]), trained)
            return int(last["number"])
        if self.run.recorded("begin") is None:
            self.run.record("begin", number=0, heldout=self._judge(trained))
        return 0

    def _step(self, trained: Accelerated, number: int, rows: Sequence[int]) -> float:
        """One optimizer step; the loss, of all processes."""
        course, ranks = self.course, self.model.ranks
        mine = [rows[place] for place in ranks.mine(len(rows))]
        size = course.size(self.samples, self.model.classes)
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        done = 0.0
        with seeded(seed_of(course.seed, number * ranks.size + ranks.rank), self.model.device):
            for part in parts:
                with trained.part(last=part is parts[-1]):
                    batch = self.samples.take(part).batches(len(part), self.model.device)[0]
                    with trained.autocast():
                        loss = self._loss(trained.wrapped, batch) * (len(part) / len(rows))
                    trained.backward(loss * ranks.size)  # DDP takes the mean over processes
                    done += float(loss.detach())
        (found,) = total(ranks, [done])
        if not math.isfinite(found):
            raise ObspruneError(f"the loss is not finite in step {number}; lower the learning rate (--lr)")
        trained.update(course.rate(number), course.clip)
        return found

    def _keep(self, trained: Accelerated, number: int, losses: list[float], due: bool, seconds: float) -> float:
        """Writes the state, then the line that says so; of older ones the best remains. Returns how long that took."""
        run = self.run
        heldout = self._judge(trained) if due else None
        if heldout is not None and not math.isfinite(heldout):
            raise ObspruneError(f"the held-out loss is not finite after step {number}; lower the learning rate (--lr)")
        start = time.monotonic()
        run.ranks.told(lambda: save(run.iterate(number), trained))
        took = time.monotonic() - start
        mean = sum(losses) / len(losses)
        run.record("step", number=number, loss=mean, heldout=heldout, seconds=seconds)
        run.forget({number, best(run)})
        if due:
            self.progress.line(
                f"step {number} of {self.course.steps}: training loss {mean:.4f}, held-out loss {heldout:.4f}"
            )
        return took

    def _said(self, number: int, losses: Sequence[float]) -> str:
        return f"step {number}: loss {losses[-1]:.4f}" if losses else ""

    @torch.no_grad()
    def _judge(self, trained: Accelerated) -> float:
        """The loss on what is held out."""
        ranks, network = self.model.ranks, trained.network.eval()
        mine = self.heldout.take(ranks.mine(len(self.heldout)))
        size, sum_ = self.course.size(mine, self.model.classes), 0.0
        for batch in mine.batches(size, self.model.device):
            with trained.autocast():
                sum_ += float(self._loss(network, batch)) * len(next(iter(batch.values())))
        _learning(network)
        (found,) = total(ranks, [sum_])
        return found / len(self.heldout)


def _learning(network: nn.Module) -> None:
    """Training mode, but for batch norms: their statistics stay (engine/retrained.py says why)."""
    network.train()
    for norm in batch_norms(network):
        norm.eval()
