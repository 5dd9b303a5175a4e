"""Block matching: once its matrices are pruned, a block's surviving weights, norms and biases are tuned together, so
that the block gives on the pruned stream what the dense block gives on the dense one (algorithms: section 8).

Adam on the squared error, zeros kept, float32 masters; one block and its activations are all that is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from obsprune.core.optimizers import Adam, cosine
from obsprune.engine.dealing import total
from obsprune.models.blocks import Block
from obsprune.models.matrices import differentiated
from obsprune.models.walk import Stop, in_turn
from obsprune.ranks import Ranks

FLOOR = 0.1
"""The share of the rate that is left at the end."""
PATIENCE = 3
"""Passes in a row that may be no better than the best one."""
LESS = 2.0**-4
"""By what the loss is scaled, once more, when a gradient overflows float16."""


@dataclass(frozen=True)
class Goals:
    """What the dense block gave, by key of the batch in the pruned stream: some to learn from, some to judge by."""

    work: Mapping[int, Any] = field(default_factory=dict)
    judge: Mapping[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Matched:
    """Squared error over squared output, on the judging batches: before, and after the best of `passes` passes (0 when
    none was better).
    """

    before: float
    after: float
    best: int
    passes: int


@final
@dataclass(frozen=True)
class Matching:
    """At most `passes` over the batches, a step a batch. A step moves a weight by about `rate` times the root mean
    square of what it belongs to, so that one rate suits all.
    """

    passes: int
    rate: float

    def __call__(self, stop: Stop, block: Block, goals: Goals, ranks: Ranks, tell: Callable[[str], None]) -> Matched:
        """Tunes the block in place and leaves it in the state that fits the judging batches best. A step is made of the
        batches that all processes have at the same place.
        """
        learner, order = _Learner(block, ranks), torch.Generator().manual_seed(0)
        before = error(stop, goals.judge, ranks)
        best, after, state, number = 0, before, learner.snapshot(), 0
        with differentiated(block.tunable.values()):
            while number < self.passes and number - best < PATIENCE:
                self._pass(stop, goals.work, learner, order, number)
                number, now = number + 1, error(stop, goals.judge, ranks)
                tell(f"{block.name}  matching, pass {number} of {self.passes}: error {now:.4f}")
                if now < after:
                    best, after, state = number, now, learner.snapshot()
        learner.restore(state)
        for parameter in learner.parameters.values():
            ranks.give(parameter.data)
        return Matched(before, after, best, number)

    def _pass(
        self, stop: Stop, work: Mapping[int, Any], learner: _Learner, order: torch.Generator, number: int
    ) -> None:
        keys = list(work)
        drawn = [keys[index] for index in torch.randperm(len(keys), generator=order).tolist()]
        for place, (key, then) in enumerate(in_turn(drawn)):
            done = (number + place / len(keys)) / self.passes
            lost = distance(stop.run(key, record=True, then=then), work[key])
            torch.autograd.backward([learner.scale * lost])
            learner.step(self.rate * (FLOOR + (1 - FLOOR) * cosine(done)))


class _Learner:
    """Float32 masters of what is tuned in a block, and their Adam state. Zeros of matrices stay, and so do matrices
    that are left dense in a parameter with others. scale: of the loss, a power of two, so that gradients fit float16;
    the masters know nothing of it.
    """

    def __init__(self, block: Block, ranks: Ranks) -> None:
        self.parameters, self.ranks, self.number, self.scale = block.tunable, ranks, 0, 1.0
        self.masters = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        weights = {matrix.parameter for matrix in block.matrices}
        self.keep = {name: (W != 0) | (name not in weights) for name, W in self.masters.items()}
        for matrix in block.left:
            if matrix.parameter in weights:
                matrix.turn(self.keep[matrix.parameter]).fill_(False)
        scales = {name: _root_mean_square(W) for name, W in self.masters.items()}
        least = min((scale for scale in scales.values() if scale), default=0.0)
        self.scales = {name: scale or least for name, scale in scales.items()}  # a bias of zeros must move, too
        self.moments = {name: (torch.zeros_like(W), torch.zeros_like(W)) for name, W in self.masters.items()}

    def step(self, rate: float) -> None:
        """Takes the gradients out of the parameters; when one of them has overflowed, that is all."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}  # all that are used
        for parameter in self.parameters.values():
            parameter.grad = None
        if self._overflown(list(gradients.values())):
            self.scale *= LESS
            return
        self.number += 1
        for name, W in self.masters.items():
            if name in gradients:
                gradient = gradients.pop(name).float() / self.scale
                self.ranks.sum([gradient])
                gradient = gradient * self.keep[name]
                Adam().step(W, gradient, *self.moments[name], rate * self.scales[name], self.number)
        self.restore(self.masters)

    def _overflown(self, gradients: Sequence[Tensor]) -> bool:
        """Whether float16 was too narrow for one of them, in any process; wider ranges are not asked."""
        narrow = [~x.isfinite().all() for x in gradients if x.dtype == torch.float16]
        return bool(narrow) and total(self.ranks, [float(torch.stack(narrow).any())])[0] > 0

    def snapshot(self) -> dict[str, Tensor]:
        return {name: W.clone() for name, W in self.masters.items()}

    def restore(self, masters: Mapping[str, Tensor]) -> None:
        for name, W in masters.items():
            self.parameters[name].data.copy_(W)


def _root_mean_square(W: Tensor) -> float:
    """Of what is not zero."""
    return float(W[W != 0].square().mean().sqrt()) if bool(W.any()) else 0.0


def distance(output: Any, goal: Any) -> Tensor:
    """Squared error of the block's first output: the hidden states."""
    y = hidden(output).float()
    return (y - hidden(goal).to(y)).square().sum()  # a goal may have been put away


def hidden(output: Any) -> Tensor:
    """The hidden states among what a block returns: the first floating tensor."""
    return next(x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point())


def error(stop: Stop, goals: Mapping[int, Any], ranks: Ranks) -> float:
    """Squared error over squared output on some batches of all processes."""
    sums = torch.zeros(2, dtype=torch.float64)
    for key, then in in_turn(goals):
        output, goal = stop.run(key, then=then), goals[key]
        energy = hidden(goal).to(hidden(output).device, torch.float32).square().sum()
        sums = sums.to(energy.device) + torch.stack([distance(output, goal), energy])  # a GPU is waited for at the end
    lost, whole = total(ranks, sums.tolist())
    return lost / whole
