"""Pruning with training in between, for methods about the whole loss: score, mask, retrain, and again; for any torch
module with a loss. Zeros stay exactly zero whatever the optimizer does.

    trainee = Trainee.of(network, lambda batch: network(batch["x"]))
    retraining = Retraining(lambda: loader, partial(torch.optim.Adam, lr=1e-3), epochs=2)
    prune_in_steps(trainee, Ranked(Taylor(), OfBatches()), evenly(0.9, 10), calibration, retraining, Silent())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from obsprune.core.patterns import Lowest, Unstructured
from obsprune.core.saliency import Evidence, Saliency
from obsprune.core.statistics import Gram
from obsprune.engine.curvature import Curvature, Trainee
from obsprune.errors import ObspruneError
from obsprune.models.matrices import Matrix, observed
from obsprune.models.samples import Batch
from obsprune.progress import Progress
from obsprune.solvers.base import AnySolver

Masks = Mapping[str, Tensor]
"""{matrix's name: keep mask [R, C]}."""


class Criterion(ABC):
    """Which weights go next."""

    @abstractmethod
    def prune(self, trainee: Trainee, masks: Masks, sparsity: float, batches: Sequence[Batch]) -> Masks:
        """Zeros round(sparsity · size) weights of all matrices together and returns the new masks, given those
        of before. batches: what scores are measured on.
        """


@final
@dataclass(frozen=True)
class Ranked(Criterion):
    """The lowest scores of all matrices together, after what was pruned before and what is zero already (or there would
    be more zeros than asked for); the survivors stay as they are.
    """

    saliency: Saliency
    curvature: Curvature

    def prune(self, trainee: Trainee, masks: Masks, sparsity: float, batches: Sequence[Batch]) -> Masks:
        evidence = self.curvature.evidence(trainee, batches)
        scores = {matrix.name: self._scored(_weight(matrix), evidence[matrix.name]) for matrix in trainee.matrices}
        gone_first = [
            score.masked_fill(~masks[name], -torch.inf).flatten() if name in masks else score.flatten()
            for name, score in scores.items()
        ]
        keep = Lowest(round(sparsity * trainee.size)).keep(torch.cat(gone_first)[None])[0]
        parts = torch.split(keep, [score.numel() for score in scores.values()])
        found = {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}
        apply(trainee, found)
        return found

    def _scored(self, W_RC: Tensor, evidence: Evidence) -> Tensor:
        return self.saliency.score(W_RC, evidence).masked_fill(W_RC == 0, -1.0)  # no score is negative


@final
@dataclass(frozen=True)
class Layerwise(Criterion):
    """Every matrix by a layer solver, under the Gram of its inputs (layer-wise OBS, Dong et al. 2017): the survivors
    make up for what is removed. All matrices lose the same share, rounded so that the number of all is exact. A solver
    that moves weights before it chooses may let one come back: `masks` bind none. One that is sparser than its share
    already keeps its own zeros beside those of the others.
    """

    solver: AnySolver

    def prune(self, trainee: Trainee, masks: Masks, sparsity: float, batches: Sequence[Batch]) -> Masks:
        grams = measure(trainee, batches)
        found: dict[str, Tensor] = {}
        done = seen = 0
        for matrix in trainee.matrices:
            seen += _weight(matrix).numel()
            count = round(sparsity * seen) - done
            share = Unstructured(count / _weight(matrix).numel())
            solution = self.solver.solve(_weight(matrix), self.solver.prepare(grams[matrix.name]), share)
            matrix.write(solution.weight)
            found[matrix.name] = solution.keep
            done += count
        return found


def measure(trainee: Trainee, batches: Sequence[Batch]) -> dict[str, Gram]:
    """The Gram of every matrix's inputs, by its name."""
    grams = {matrix.name: Gram(matrix.shape[1], matrix.name, matrix.device) for matrix in trainee.matrices}

    def add(matrix: Matrix, inputs: Tensor) -> None:
        for x_TC in matrix.tokens(inputs):
            grams[matrix.name].add(x_TC)

    with torch.no_grad(), observed(list(trainee.matrices), add):
        for batch in batches:
            trainee.logits(batch)
    return grams


@dataclass(frozen=True)
class Retraining:
    """How the survivors recover. batches: makes those of one epoch, in a new order each time; optimizer: from the
    parameters; rate: the share of its learning rate that is left after the share of the steps that is done; parameters:
    which are trained, all of the network's without one; batches_an_epoch: with it the rate falls from batch to batch,
    else from epoch to epoch.
    """

    batches: Callable[[], Iterable[Batch]]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    epochs: int
    rate: Callable[[float], float] = lambda done: 1.0
    parameters: Sequence[nn.Parameter] | None = None
    batches_an_epoch: int | None = None

    def __call__(self, trainee: Trainee, masks: Masks, step: Callable[[], None] = lambda: None) -> float:
        """Trains, `step` is called after each epoch; returns the mean loss of the last one. A network in evaluation
        mode again afterwards. Raises ObspruneError when loss or weights are not finite.
        """
        parameters = list(trainee.network.parameters() if self.parameters is None else self.parameters)
        optimizer, mean = self.optimizer(parameters), 0.0
        trainee.network.train()
        for epoch in range(self.epochs):
            mean = self._epoch(trainee, optimizer, masks, epoch)
            step()
        trainee.network.eval()
        if not all(bool(parameter.isfinite().all()) for parameter in parameters):  # the last update has no loss
            raise ObspruneError("the weights are not finite; lower the learning rate (--lr)")
        return mean

    def _epoch(self, trainee: Trainee, optimizer: torch.optim.Optimizer, masks: Masks, epoch: int) -> float:
        losses = []
        for number, batch in enumerate(self.batches()):
            part = min(number / self.batches_an_epoch, 1.0) if self.batches_an_epoch else 0.0
            _slow_down(optimizer, self.rate((epoch + part) / self.epochs))
            optimizer.zero_grad()
            loss = trainee.mean_loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            apply(trainee, masks)
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        if not mean - mean == 0:
            raise ObspruneError("the loss is not finite; lower the learning rate (--lr)")
        return mean


def prune_in_steps(
    trainee: Trainee,
    criterion: Criterion,
    sparsities: Sequence[float],
    batches: Sequence[Batch],
    retraining: Retraining,
    progress: Progress,
    after: Callable[[float, Masks], str] = lambda sparsity, masks: "",
    masks: Masks | None = None,
) -> Masks:
    """Prunes to each of the rising `sparsities` and retrains after each; returns the masks at the end.

    after: called with each sparsity and its masks, and gives a line about it; masks: what is pruned already.
    """
    masks = masks or {}
    progress.stage("pruning and retraining", len(sparsities) * retraining.epochs)
    for sparsity in sparsities:
        masks = criterion.prune(trainee, masks, sparsity, batches)
        loss = retraining(trainee, masks, progress.step)
        progress.line(f"sparsity {sparsity:.4f}: training loss {loss:.4f}{after(sparsity, masks)}")
    return masks


def evenly(sparsity: float, steps: int) -> list[float]:
    """`steps` sparsities at equal distances up to the last one."""
    return [sparsity * step / steps for step in range(1, steps + 1)]


@torch.no_grad()
def apply(trainee: Trainee, masks: Masks) -> None:
    """Zeros what is pruned, NaN or not."""
    for matrix in trainee.matrices:
        if matrix.name in masks:
            matrix.turn(matrix.weight).masked_fill_(~masks[matrix.name], 0)


def _slow_down(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Leaves the optimizer this share of the learning rate it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * share


def _weight(matrix: Matrix) -> Tensor:
    return matrix.turn(matrix.weight)
