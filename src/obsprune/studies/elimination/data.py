"""What networks learn before elimination–compensation prunes them: digits, and a column of soil."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from obsprune.core.saliency import Loss
from obsprune.engine.curvature import mean_cross_entropy
from obsprune.studies.elimination.diffusion import Column
from obsprune.studies.material import Material
from obsprune.studies.taylor import Signals

TRAINED = 0.8
"""The share of all cases that is trained on."""
SECONDS = 500.0
"""How long the columns of soil are followed."""


@dataclass(frozen=True)
class Parts:
    """What is trained on, and what is reported."""

    train: Signals
    test: Signals


class Problem(ABC):
    """A task for a fully-connected network. score: what `scored` counts, in percent; higher is better."""

    inputs: int
    outputs: int
    unit: Callable[[], nn.Module]
    loss: Loss
    score: str
    told: str

    def require(self, material: Material) -> None:
        """Raises InputError when data is missing."""
        return

    @abstractmethod
    def parts(self, material: Material, noise: float, seed: int) -> Parts:
        """Drawn for a seed, with noise of this size."""

    @abstractmethod
    def scored(self, z_BK: Tensor, asked: Tensor) -> float:
        """In percent."""

    def network(self, depth: int, width: int, seed: int) -> nn.Sequential:
        """`depth` hidden layers of `width` units."""
        layers: list[nn.Module] = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for entering in [self.inputs, *[width] * (depth - 1)]:
                layers += [nn.Linear(entering, width), self.unit()]
            return nn.Sequential(*layers, nn.Linear(width, self.outputs))

    def parameters(self, depth: int, width: int) -> int:
        """Of such a network, biases and all."""
        return (self.inputs + 1) * width + (depth - 1) * (width + 1) * width + (width + 1) * self.outputs


@final
@dataclass(frozen=True)
class Digits(Problem):
    """MNIST's test images, 8,000 to train on and 2,000 to test; grey values from 0 to 1, less `mean`, over `std`.
    Noise: normal, added to the grey values of all images.
    """

    mean: float = 0.0
    std: float = 1.0
    inputs, outputs = 784, 10
    unit, loss, score = nn.ReLU, staticmethod(mean_cross_entropy), "accuracy, %"
    told = "MNIST's 10,000 test images, split anew for each seed into 8,000 to train on and 2,000 to test"

    def require(self, material: Material) -> None:
        material.mnist_test()

    def parts(self, material: Material, noise: float, seed: int) -> Parts:
        images, digits = material.mnist_test()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        x = images.flatten(1) / 255
        x = (x + noise * torch.randn(x.shape, generator=generator) - self.mean) / self.std
        return split(x[order], digits[order])

    def scored(self, z_BK: Tensor, asked: Tensor) -> float:
        return 100 * float((z_BK.argmax(1) == asked).double().mean())


@final
@dataclass(frozen=True)
class Sorption(Problem):
    """Place, time and start -> concentration, in columns of soil that start at one concentration in 0 … 0.2; a fifth
    of the columns are for testing. Noise: normal, on the training targets alone, over their standard deviation.
    """

    columns: int = 20
    cells: int = 32
    steps: int = 50
    inputs, outputs = 3, 1
    unit, loss, score = nn.Tanh, staticmethod(functional.mse_loss), "explained variance, %"
    told = "the diffusion–sorption equation with PDEBench's numbers, solved by finite volumes; 20 columns, 4 to test"

    def parts(self, material: Material, noise: float, seed: int) -> Parts:
        generator = torch.Generator().manual_seed(seed)
        column = Column(cells=self.cells, steps=self.steps, step=SECONDS / self.steps)
        start_B = 0.2 * torch.rand(self.columns, generator=generator, dtype=torch.float64)
        u_TBX = column.solve(start_B[:, None].expand(-1, self.cells))
        t, b, x = torch.meshgrid(column.times / column.times[-1], start_B / 0.2, column.places, indexing="ij")
        cases = torch.stack([x, t, b], -1).transpose(0, 1).flatten(0, 2).float()
        y = u_TBX.transpose(0, 1).reshape(-1, 1).float()
        parts = split(2 * cases - 1, y)
        order = torch.randperm(len(parts.train.x), generator=generator)  # methods look at the first: not at one column
        noisy = parts.train.y + noise * parts.train.y.std() * torch.randn(parts.train.y.shape, generator=generator)
        return Parts(Signals(parts.train.x[order], noisy[order]), parts.test)

    def scored(self, z_BK: Tensor, asked: Tensor) -> float:
        return 100 * (1 - float(functional.mse_loss(z_BK, asked) / asked.var(correction=0)))


PROBLEMS: dict[str, Problem] = {
    "mnist": Digits(),
    "mnist-standardised": Digits(0.1307, 0.3081),
    "diffusion": Sorption(),
}


def split(x: Tensor, y: Tensor) -> Parts:
    """The first cases to train on, the others to test."""
    count = round(TRAINED * len(x))
    return Parts(Signals(x[:count], y[:count]), Signals(x[count:], y[count:]))
