"""Curves of low loss between two minimisers of a network (Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and
Fast Ensembling of DNNs"): B(t) = (1 − t)² w_0 + 2 t (1 − t) θ + t² w_1, θ trained to minimise the loss at random t.

Weights are one vector [P] throughout, in the order of the network's parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from obsprune.engine.curvature import ASKED, mean_cross_entropy
from obsprune.models.samples import Batch


@dataclass(frozen=True)
class Bezier:
    """From start (t = 0) to end (t = 1); with `control` in the middle of both it is the straight line."""

    start_P: Tensor
    control_P: Tensor
    end_P: Tensor

    @classmethod
    def straight(cls, start: nn.Module, end: nn.Module) -> Bezier:
        """The line between two networks of one kind."""
        ends = [nn.utils.parameters_to_vector(one.parameters()).detach() for one in (start, end)]
        return cls(ends[0], (ends[0] + ends[1]) / 2, ends[1])

    def at(self, t: float) -> Tensor:
        return (1 - t) ** 2 * self.start_P + 2 * t * (1 - t) * self.control_P + t**2 * self.end_P


def trained(
    line: Bezier,
    network: nn.Module,
    epoch: Callable[[], Iterable[Batch]],
    epochs: int,
    rate: float,
    random: torch.Generator,
) -> Bezier:
    """The curve whose control point SGD has moved, one t drawn for each batch. network: only its shape is used."""
    control = nn.Parameter(line.control_P.clone())
    curve, optimizer = Bezier(line.start_P, control, line.end_P), torch.optim.SGD([control], lr=rate, momentum=0.9)
    for _ in range(epochs):
        for batch in epoch():
            optimizer.zero_grad()
            weights = named(network, curve.at(float(torch.rand(1, generator=random))))
            mean_cross_entropy(functional_call(network, weights, batch["x"]), batch[ASKED]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Bezier(line.start_P, control.detach(), line.end_P)


def along(
    curve: Bezier, network: nn.Module, places: Sequence[float], measure: Callable[[nn.Module], float]
) -> list[float]:
    """What `measure` says of the networks at these t."""
    walker = copy.deepcopy(network)
    found = []
    for place in places:
        nn.utils.vector_to_parameters(curve.at(place), walker.parameters())
        found.append(measure(walker))
    return found


def named(network: nn.Module, w_P: Tensor) -> dict[str, Tensor]:
    """A vector cut into a network's parameters, by name."""
    parameters = dict(network.named_parameters())
    parts = torch.split(w_P, [one.numel() for one in parameters.values()])
    return {name: part.view_as(one) for (name, one), part in zip(parameters.items(), parts, strict=True)}
