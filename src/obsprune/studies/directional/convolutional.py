"""The networks that Chao et al. 2020 train from scratch; `width` makes each as thin as a test wants it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from obsprune.models.scratch import classifier

STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))
"""VGG16's convolutions between poolings, in units of its width of 64."""
DEPTH = 4
"""Blocks of one of WRN28's three stages: (28 - 4) / 6."""


def vgg16(classes: int, width: int = 64, normed: bool = False) -> nn.Module:
    """VGG16 for images of 32 x 32 (Garipov et al. 2018): 13 convolutions, three Linear layers with dropout. As in the
    logs of gRDA's authors without batch norm; normed: with it.
    """
    layers: list[nn.Module] = []
    channels = 3
    for stage in STAGES:
        for share in stage:
            layers.append(_started(nn.Conv2d(channels, share * width, 3, padding=1)))
            channels = share * width
            layers += [nn.BatchNorm2d(channels), nn.ReLU()] if normed else [nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Dropout(), nn.Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(channels, classes))


def wrn28x10(classes: int, width: int = 10) -> nn.Module:
    """A wide residual network of 28 layers (Zagoruyko & Komodakis 2016), convolutions with biases as there in Garipov
    et al.; images of 32 x 32. width: how often as wide as a ResNet.
    """
    sizes = (16, 16 * width, 32 * width, 64 * width)
    layers: list[nn.Module] = [nn.Conv2d(3, sizes[0], 3, padding=1)]
    for stage, (before, channels) in enumerate(pairwise(sizes)):
        layers.append(Wide(before, channels, stride=1 if stage == 0 else 2))
        layers += [Wide(channels, channels) for _ in range(DEPTH - 1)]
    last = nn.BatchNorm2d(sizes[-1], momentum=0.9)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], classes)]
    return nn.Sequential(*layers, last, nn.ReLU(), *pooled)


def resnet50(classes: int, width: int = 64) -> nn.Module:
    """ResNet50, strides in the 3 x 3 convolutions. width: channels of the first layer."""
    sizes = [4 * width, 8 * width, 16 * width, 32 * width]
    return classifier("resnet", classes, embedding_size=width, hidden_sizes=sizes)


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "vgg16": vgg16,
    "vgg16-bn": partial(vgg16, normed=True),
    "wrn28x10": wrn28x10,
    "resnet50": resnet50,
}
"""Name -> what makes it of a number of classes and a width."""


@final
class Wide(nn.Module):
    """A pre-activation block of two convolutions; the second has the stride."""

    def __init__(self, before: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(before, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1)
        same = stride == 1 and before == channels
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(before, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(functional.relu(self.norm1(x)))
        return torch.add(self.conv2(functional.relu(self.norm2(inner))), self.shortcut(x))


def _started(conv: nn.Conv2d) -> nn.Conv2d:
    """Without batch norm torch's own start would let the signal die out."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
