"""What gRDA and SGD are compared on: data, a network, and what is measured of it after training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import final

import torch
from torch import nn

from obsprune.core.saliency import Magnitude
from obsprune.engine.curvature import CURVATURES, Trainee, mean_cross_entropy
from obsprune.engine.training import Masks, Ranked, Retraining
from obsprune.studies.material import Labelled, Material
from obsprune.studies.taylor import Signals

HELD_OUT = 2000
"""Of MNIST's test images, where the training images are not at hand: the others are trained on."""


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between, torch's own start."""
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def split_mnist(material: Material) -> Labelled:
    """MNIST's 10,000 test images, from 0 to 1: 8,000 to train on and 2,000 to test, drawn once."""
    images, digits = material.mnist_test()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = images.flatten(1)[order] / 255, digits[order]
    told = "MNIST's 10,000 test images, 8,000 to train on and 2,000 to test (the 60,000 training images are not used)"
    return Labelled(x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:], told)


@final
@dataclass(frozen=True)
class Ground:
    """Data, and the network that is trained on it."""

    read: Callable[[Material], Labelled]
    widths: tuple[int, ...]


GROUNDS = {
    "mnist1d": Ground(Material.mnist1d, (40, 128, 128, 10)),
    "mnist": Ground(split_mnist, (784, 300, 100, 10)),
}


def falling(done: float) -> float:
    """The share of the learning rate after the share `done` of the epochs, as in the authors' code for VGG16 and
    WRN28x10 (from Garipov et al.): all of it to the half, then linearly to 0.01 at nine tenths.
    """
    return min(1.0, max(0.01, 1 - 0.99 * (done - 0.5) / 0.4))


@dataclass(frozen=True)
class Found:
    """Of one network: shares of zeros of all weights and of each layer's, its loss in training and accuracies in %."""

    zeros: float
    layers: list[float]
    loss: float
    train: float
    test: float


@dataclass(frozen=True)
class Bench:
    """The data of one seed, and what is done with a network on it."""

    train: Signals
    test: Signals
    batch: int
    seed: int

    @classmethod
    def of(cls, data: Labelled, batch: int, seed: int) -> Bench:
        return cls(Signals(data.x, data.y), Signals(data.x_test, data.y_test), batch, seed)

    def start(self, widths: Sequence[int], apart: int = 0) -> nn.Module:
        """The network before training; apart: another one, as seed + apart would have it."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + apart)
            return mlp(*widths)

    def trained(
        self,
        start: nn.Module,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        epochs: int,
        masks: Masks | None = None,
    ) -> nn.Module:
        """A copy, trained on the seed's batches."""
        network = copy.deepcopy(start)
        batches = partial(self.train.batches, self.batch, torch.Generator().manual_seed(self.seed))
        Retraining(batches, optimizer, epochs, falling)(trainee(network), masks or {})
        return network

    def magnitude(self, network: nn.Module, sparsity: float) -> Masks:
        """Sets the smallest weights of all layers together to zero, in place."""
        criterion = Ranked(Magnitude(), CURVATURES["none"])
        return criterion.prune(trainee(network), {}, sparsity, self.train.first(self.batch, self.batch))

    def train_loss(self, network: nn.Module) -> float:
        """In nats a sample."""
        with torch.no_grad():
            return float(mean_cross_entropy(network(self.train.x), self.train.y))

    def found(self, network: nn.Module) -> Found:
        """All that is told of a network."""
        matrices = [one.detach() for one in network.parameters() if one.ndim > 1]
        gone = [int((one == 0).sum()) for one in matrices]
        sizes = [one.numel() for one in matrices]
        layers = [count / size for count, size in zip(gone, sizes, strict=True)]
        accuracies = [part.accuracy(network) for part in (self.train, self.test)]
        return Found(sum(gone) / sum(sizes), layers, self.train_loss(network), *accuracies)


def trainee(network: nn.Module) -> Trainee:
    """A network of vectors, asked for classes."""
    return Trainee.of(network, lambda batch: network(batch["x"]))
