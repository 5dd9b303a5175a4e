"""Optimizers as pure functions on one tensor and its state.

Legend: w the master weight, g its gradient, m and v the running means of g and g².
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor


@final
@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, Algorithm 1) without weight decay."""

    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8

    def step(self, w: Tensor, g: Tensor, m: Tensor, v: Tensor, rate: float, number: int) -> None:
        """Changes w, m and v in place; number counts from 1."""
        m.lerp_(g, 1 - self.beta1)
        v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        scale = math.sqrt(1 - self.beta2**number)
        w.addcdiv_(m, v.sqrt().div_(scale).add_(self.epsilon), value=-rate / (1 - self.beta1**number))


def cosine(done: float) -> float:
    """The share of the rate that is left after the share `done` of the steps: from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))
