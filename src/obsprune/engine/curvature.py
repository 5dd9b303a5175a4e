"""Gradients and curvature of the whole loss at every matrix, from batches (core/saliency.py has the formulas)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from obsprune.core.saliency import Diagonal, Evidence, Kronecker, Loss, Squares, empirical, gauss_newton
from obsprune.errors import InputError
from obsprune.models.matrices import Matrix, find_matrices
from obsprune.models.samples import Batch

ASKED = "labels"
"""The key of a batch with what the network is asked for."""
Cotangents = Callable[[Tensor, Tensor, Loss], Sequence[Tensor]]
"""Directions at the logits [B, K], from them, what is asked for, and the loss."""


def mean_cross_entropy(z_BK: Tensor, labels: Tensor) -> Tensor:
    """The mean over samples, in nats."""
    return functional.cross_entropy(z_BK, labels)


@dataclass(frozen=True)
class Trainee:
    """Any torch module with its prunable matrices. logits: of a batch, [B, K]; loss: mean of logits and
    batch["labels"], and nothing else may mix the samples of a batch.
    """

    network: nn.Module
    matrices: Sequence[Matrix]
    logits: Callable[[Batch], Tensor]
    loss: Loss = mean_cross_entropy

    @classmethod
    def of(cls, network: nn.Module, logits: Callable[[Batch], Tensor], loss: Loss = mean_cross_entropy) -> Trainee:
        """All Linear and Conv2d layers of a module, float32. Raises InputError when there are none."""
        matrices = find_matrices("", network, lambda name: torch.float32)
        if not matrices:
            raise InputError(f"{type(network).__name__} has no Linear or Conv2d layer")
        return cls(network, matrices, logits, loss)

    def mean_loss(self, batch: Batch) -> Tensor:
        return self.loss(self.logits(batch), batch[ASKED])

    @property
    def size(self) -> int:
        """Weights of all matrices."""
        return sum(rows * columns for rows, columns in (matrix.shape for matrix in self.matrices))


def gradients(trainee: Trainee, batch: Batch) -> dict[str, Tensor]:
    """Of the mean loss of a batch, [R, C] by matrix. Raises InputError for a matrix the loss does not depend on."""
    parameters = {matrix.parameter: matrix.tensor for matrix in trainee.matrices}
    found = torch.autograd.grad(trainee.mean_loss(batch), list(parameters.values()), allow_unused=True)
    by_name = dict(zip(parameters, found, strict=True))
    for name, gradient in by_name.items():
        if gradient is None:
            raise InputError(f"no gradient reaches {name}; leave it dense (--skip)")
    return {matrix.name: matrix.turn(by_name[matrix.parameter]).float() for matrix in trainee.matrices}


class Curvature(ABC):
    """What stands for the diagonal of the Hessian."""

    @abstractmethod
    def evidence(self, trainee: Trainee, batches: Sequence[Batch]) -> dict[str, Evidence]:
        """By matrix's name."""


@final
@dataclass(frozen=True)
class Flat(Curvature):
    """Nothing: h = 0; for scores that ask for the gradient alone."""

    def evidence(self, trainee: Trainee, batches: Sequence[Batch]) -> dict[str, Evidence]:
        return {name: Evidence(g, torch.zeros_like(g)) for name, g in _mean_gradients(trainee, batches)[0].items()}


@final
@dataclass(frozen=True)
class OfBatches(Curvature):
    """E[g²] over the mean gradients of batches: depends on their size, and shrinks with it away from the gradient."""

    def evidence(self, trainee: Trainee, batches: Sequence[Batch]) -> dict[str, Evidence]:
        g, squares = _mean_gradients(trainee, batches)
        return {name: Evidence(g[name], squares[name]) for name in g}


@final
@dataclass(frozen=True)
class OfSamples(Curvature):
    """A sum over samples of what `cotangents` at their logits become at the matrices."""

    cotangents: Cotangents
    diagonal: type[Diagonal]

    def evidence(self, trainee: Trainee, batches: Sequence[Batch]) -> dict[str, Evidence]:
        g, _ = _mean_gradients(trainee, batches)
        sums = {matrix.name: self.diagonal() for matrix in trainee.matrices}
        for batch in batches:
            pull_back(trainee, batch, self.cotangents, sums)
        samples = sum(len(batch[ASKED]) for batch in batches)
        return {name: Evidence(g[name], sums[name].sum_RC / samples) for name in g}


class Sum(Protocol):
    """Takes the inputs of a matrix, and something for each of its outputs, by sample."""

    def add(self, x_BTC: Tensor, d_BTR: Tensor) -> None: ...


def pull_back(trainee: Trainee, batch: Batch, cotangents: Cotangents, sums: Mapping[str, Sum]) -> None:
    """Adds to the sum of each matrix, by its name, what enters it and what each of the cotangents of the batch's logits
    becomes at its outputs.
    """
    matrices, size = trainee.matrices, len(batch[ASKED])
    with tapped(matrices) as taps:
        z_BK = trainee.logits(batch)
    x = {matrix.name: by_sample(matrix.tokens(taps[matrix.layer].input), size) for matrix in matrices}
    outputs = [taps[matrix.layer].output for matrix in matrices]
    asked = cotangents(z_BK.detach().float(), batch[ASKED], trainee.loss)
    for left, cotangent in zip(reversed(range(len(asked))), asked, strict=True):
        found = torch.autograd.grad(z_BK, outputs, cotangent.to(z_BK.dtype), retain_graph=left > 0)
        for matrix, gradient in zip(matrices, found, strict=True):
            sums[matrix.name].add(x[matrix.name], by_sample([matrix.outputs(gradient)], size))


CURVATURES: dict[str, Curvature] = {
    "none": Flat(),
    "batch": OfBatches(),
    "sample": OfSamples(empirical, Squares),
    "kfac": OfSamples(empirical, Kronecker),
    "gauss-newton": OfSamples(gauss_newton, Squares),
}
"""By the name that users give. sample, kfac: the empirical Fisher, and its Kronecker approximation."""


@dataclass(frozen=True)
class Tap:
    """What went into a layer, and what came out."""

    input: Tensor
    output: Tensor


@contextmanager
def tapped(matrices: Sequence[Matrix]) -> Iterator[dict[str, Tap]]:
    """While open, every layer leaves its input and output here, by its name. Raises InputError for one that runs twice
    in a forward: its gradients by sample cannot be told apart.
    """
    taps: dict[str, Tap] = {}

    def hook_of(layer: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if layer in taps:
                raise InputError(f"{layer} runs twice in one forward; use --curvature batch, or leave it dense")
            taps[layer] = Tap(args[0].detach(), output)

        return hook

    with ExitStack() as stack:
        for layer, module in {matrix.layer: matrix.module for matrix in matrices}.items():
            stack.callback(module.register_forward_hook(hook_of(layer)).remove)
        yield taps


def by_sample(pieces: Iterable[Tensor], samples: int) -> Tensor:
    """Tokens in the order of their samples, [B, T, …], float32."""
    tokens = torch.cat(list(pieces)).float()
    return tokens.reshape(samples, -1, tokens.shape[-1])


def _mean_gradients(trainee: Trainee, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean over batches of their gradients, and of the squares of these."""
    g = {matrix.name: torch.zeros(matrix.shape, device=matrix.device) for matrix in trainee.matrices}
    squares = {name: torch.zeros_like(zero) for name, zero in g.items()}
    for batch in batches:
        for name, gradient in gradients(trainee, batch).items():
            g[name] += gradient / len(batches)
            squares[name].addcmul_(gradient, gradient, value=1 / len(batches))
    return g, squares
