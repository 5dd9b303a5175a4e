"""Untrained networks of transformers, for experiments that train their own."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification


@final
class Logits(nn.Module):
    """An image classifier as a plain network: pixels in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=x).logits
        return found


def classifier(kind: str, classes: int, **options: Any) -> nn.Module:
    """An image classifier of a type that transformers knows (`resnet`), with random weights. options: its config's."""
    auto: Any = AutoModelForImageClassification
    return Logits(auto.from_config(AutoConfig.for_model(kind, num_labels=classes, **options)))
