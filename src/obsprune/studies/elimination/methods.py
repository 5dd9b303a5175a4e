"""How weights are chosen and taken out of a trained network, all of a sparsity's at once: magnitude and others, and
elimination–compensation, whose biases make up for what goes (core/elimination.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from obsprune.core.elimination import Heard, Sketch, of_outputs
from obsprune.core.patterns import Lowest
from obsprune.core.saliency import FirstOrder, Magnitude, Saliency, gauss_newton
from obsprune.engine.curvature import CURVATURES, Cotangents, Trainee, pull_back
from obsprune.engine.training import Masks, measure
from obsprune.models.matrices import Matrix
from obsprune.models.samples import Batch

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class Removal:
    """By matrix: scores, the lower, the sooner a weight goes; means, how much the bias grows for every unit of weight
    that goes [R, C].
    """

    scores: Scores
    means: Mapping[str, Tensor]

    def without_bias(self) -> Removal:
        """The biases stay as they are."""
        return replace(self, means={name: torch.zeros_like(mean) for name, mean in self.means.items()})

    @torch.no_grad()
    def carry_out(self, trainee: Trainee, sparsity: float) -> Masks:
        """Zeros the lowest round(sparsity · size) of all matrices together, zeros of before first, and moves biases;
        returns what is kept.
        """
        scores = [self.scores[m.name].masked_fill(weight_of(m) == 0, -1.0) for m in trainee.matrices]
        keep = Lowest(round(sparsity * trainee.size)).keep(torch.cat([score.flatten() for score in scores])[None])[0]
        parts = torch.split(keep, [score.numel() for score in scores])
        masks = {m.name: part.view(m.shape) for m, part in zip(trainee.matrices, parts, strict=True)}
        for matrix in trainee.matrices:
            W_RC, gone_RC = weight_of(matrix), ~masks[matrix.name]
            if matrix.bias is not None:
                matrix.bias[matrix.rows] += (W_RC * gone_RC * self.means[matrix.name]).sum(1)
            W_RC.masked_fill_(gone_RC, 0)
        return masks


class Method(ABC):
    """Looks at a network once and says which weights go, and what becomes of the biases."""

    @abstractmethod
    def look(self, trainee: Trainee, batches: Sequence[Batch], generator: torch.Generator) -> Removal:
        """generator: of all that is random."""


@final
@dataclass(frozen=True)
class Chance(Method):
    """Random weights."""

    def look(self, trainee: Trainee, batches: Sequence[Batch], generator: torch.Generator) -> Removal:
        scores = {matrix.name: torch.rand(matrix.shape, generator=generator) for matrix in trainee.matrices}
        return Removal(scores, scores).without_bias()


@final
@dataclass(frozen=True)
class Scored(Method):
    """A score that asks for weight and mean gradient alone; biases stay."""

    saliency: Saliency

    def look(self, trainee: Trainee, batches: Sequence[Batch], generator: torch.Generator) -> Removal:
        evidence = CURVATURES["none"].evidence(trainee, batches)
        scores = {m.name: self.saliency.score(weight_of(m), evidence[m.name]) for m in trainee.matrices}
        return Removal(scores, scores).without_bias()


@final
@dataclass(frozen=True)
class Eliminated(Method):
    """Elimination–compensation. cotangents: by what the output's change is measured, with a generator for what is
    random in it; compensate: the bias makes up for what goes, and the score knows.
    """

    cotangents: Callable[[torch.Generator], Cotangents]
    compensate: bool = True

    def look(self, trainee: Trainee, batches: Sequence[Batch], generator: torch.Generator) -> Removal:
        heard = listen(trainee, batches, self.cotangents(generator))
        means = {name: one.mean_RC.float() for name, one in heard.items()}
        if self.compensate:
            return Removal({m.name: heard[m.name].importance(weight_of(m)) for m in trainee.matrices}, means)
        plain = {m.name: heard[m.name].uncompensated(weight_of(m)) for m in trainee.matrices}
        return Removal(plain, means).without_bias()


@final
@dataclass(frozen=True)
class Local(Method):
    """The layer by itself, J left out: w² Var a, and the bias takes the mean input. No backward pass."""

    def look(self, trainee: Trainee, batches: Sequence[Batch], generator: torch.Generator) -> Removal:
        grams = measure(trainee, batches)
        variances = {name: gram.centred().H_CC.diagonal() / gram.count for name, gram in grams.items()}
        scores = {m.name: weight_of(m).square() * variances[m.name] for m in trainee.matrices}
        return Removal(scores, {m.name: grams[m.name].mean_C.expand(m.shape) for m in trainee.matrices})


@final
@dataclass(frozen=True)
class Compensated(Method):
    """Chosen by `inner`, and the biases take what `biases` says."""

    inner: Method
    biases: Method

    def look(self, trainee: Trainee, batches: Sequence[Batch], generator: torch.Generator) -> Removal:
        chosen = self.inner.look(trainee, batches, generator)
        return replace(chosen, means=self.biases.look(trainee, batches, generator).means)


@final
@dataclass(frozen=True)
class Exact(Method):
    """Nothing is expanded: every weight is taken out by itself, its bias moved as elimination–compensation says, and
    the network is run. For small nn.Sequential networks.
    """

    def look(self, trainee: Trainee, batches: Sequence[Batch], generator: torch.Generator) -> Removal:
        means = METHODS["elimination"].look(trainee, batches, generator).means
        x = torch.cat([batch["x"] for batch in batches])
        assert isinstance(trainee.network, nn.Sequential)
        scores = {m.name: true_changes(trainee.network, m, x, means[m.name]) for m in trainee.matrices}
        return Removal(scores, means)


METHODS: dict[str, Method] = {
    "random": Chance(),
    "magnitude": Scored(Magnitude()),
    "gradient": Scored(FirstOrder()),
    "elimination": Eliminated(lambda generator: of_outputs),
    "elimination-sketch": Eliminated(Sketch),
    "elimination-loss": Eliminated(lambda generator: gauss_newton),
    "elimination-local": Local(),
    "bias-stays": Eliminated(lambda generator: of_outputs, compensate=False),
    "magnitude-bias": Compensated(Scored(Magnitude()), Local()),
    "exact": Exact(),
}
"""elimination: the paper's. sketch: the same from a single backward pass; loss: the output's change measured by the
loss's curvature; local: by the layer's own output; bias-stays: the score for biases that do not move; magnitude-bias:
the biases alone; exact: without the Taylor expansion."""


def listen(trainee: Trainee, batches: Sequence[Batch], cotangents: Cotangents) -> dict[str, Heard]:
    """What the output hears of every matrix's inputs, by its name."""
    heard = {matrix.name: Heard(*matrix.shape, matrix.device) for matrix in trainee.matrices}
    for batch in batches:
        pull_back(trainee, batch, cotangents, heard)
    return heard


@torch.no_grad()
def true_changes(network: nn.Sequential, matrix: Matrix, x: Tensor, mean_RC: Tensor) -> Tensor:
    """E‖change of the output‖² when one weight is removed and its bias grows by w · mean [R, C], by running what comes
    after it with every input of the row taken out in turn.
    """
    place = int(matrix.layer)
    before, after = network[:place], network[place + 1 :]
    a_NC, W_RC = before(x), weight_of(matrix)
    z_NR = network[place](a_NC)
    o_NK, changes = after(z_NR), []
    for row, w_C in enumerate(W_RC):
        moved_CNR = z_NR.repeat(len(w_C), 1, 1)
        moved_CNR[:, :, row] += w_C[:, None] * (mean_RC[row][:, None] - a_NC.T)
        changes.append((after(moved_CNR) - o_NK).square().sum(-1).mean(1))
    return torch.stack(changes)


def weight_of(matrix: Matrix) -> Tensor:
    """The weight [R, C], a view of the layer's own."""
    return matrix.turn(matrix.weight)
