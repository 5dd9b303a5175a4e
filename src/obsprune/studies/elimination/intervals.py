"""How far a network's output can be from its first-order Taylor expansion along a path of weights: interval arithmetic
on the output's second derivative (Moore 1966; the remainder in its integral form).

Along the path weights are W − ξ D and biases b + ξ s, ξ from 0 to 1. It is cut into pieces; on each the pre-activations
are bounded by the mean value theorem around the middle, so that a weight and the bias that makes up for it may cancel.
Then |o(1) − o(0) − o′(0)| ≤ Σ over pieces [l, h] of max |o″| ((1−l)² − (1−h)²)/2, output by output. Float64 without
directed rounding: true to about 1e-12 of the numbers involved.

Legend: P pieces, N samples, R outputs and C inputs of a layer; z pre-activation, a activation tanh z; a prime is d/dξ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """Numbers between lo and hi, element by element."""

    lo: Tensor
    hi: Tensor

    @classmethod
    def around(cls, middle: Tensor, radius: Tensor) -> Interval:
        """middle ± radius."""
        return cls(middle - radius, middle + radius)

    @property
    def middle(self) -> Tensor:
        """Half way between both ends."""
        return (self.lo + self.hi) / 2

    @property
    def radius(self) -> Tensor:
        """Half the width."""
        return (self.hi - self.lo) / 2

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value."""
        return torch.maximum(self.lo.abs(), self.hi.abs())

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.lo + other.lo, self.hi + other.hi)

    def __sub__(self, other: Interval) -> Interval:
        return Interval(self.lo - other.hi, self.hi - other.lo)

    def __mul__(self, other: Interval) -> Interval:
        return span(self.lo * other.lo, self.lo * other.hi, self.hi * other.lo, self.hi * other.hi)

    def square(self) -> Interval:
        """Of every number in it: never negative."""
        return self.through(torch.square, 0.0)

    def through(self, function: Callable[[Tensor], Tensor], *turns: float) -> Interval:
        """What a function does to it that rises or falls between its turning points, all of which are named."""
        inside = [torch.clamp(torch.full_like(self.lo, turn), self.lo, self.hi) for turn in turns]
        return span(*map(function, (self.lo, self.hi, *inside)))

    def times(self, matrix_PRC: Interval) -> Interval:
        """Σ_c matrix_rc x_c of x [P, N, C]: [P, N, R]."""
        W, x = matrix_PRC, self
        radius = x.radius @ W.middle.abs().mT + (x.middle.abs() + x.radius) @ W.radius.mT
        return Interval.around(x.middle @ W.middle.mT, radius)


def span(*ends: Tensor) -> Interval:
    """From the smallest to the largest."""
    stacked = torch.stack(ends)
    return Interval(stacked.amin(0), stacked.amax(0))


@dataclass(frozen=True)
class Jet:
    """Values, first and second derivatives on each piece, and the values in its middle; all [P, N, …]."""

    point: Tensor
    value: Interval
    first: Interval
    second: Interval

    @classmethod
    def of(cls, x_PNC: Tensor) -> Jet:
        """Inputs, which do not move."""
        still = Interval(torch.zeros_like(x_PNC), torch.zeros_like(x_PNC))
        return cls(x_PNC, Interval(x_PNC, x_PNC), still, still)

    def tanh(self) -> Jet:
        """tanh is monotone; of its own value, its derivatives 1 − u² and −2u(1 − u²) turn at 0 and at ±1/√3."""
        u = self.value.through(torch.tanh)
        slope = u.through(lambda u: 1 - u.square(), 0.0)
        bend = u.through(lambda u: -2 * u * (1 - u.square()), -(3**-0.5), 3**-0.5)
        return Jet(self.point.tanh(), u, slope * self.first, bend * self.first.square() + slope * self.second)


@dataclass(frozen=True)
class Moving:
    """One layer along the path: W − ξ D, b + ξ s; W and D [R, C], b and s [R], float64."""

    W: Tensor
    b: Tensor
    D: Tensor
    s: Tensor

    def at(self, xi: Tensor, a: Tensor) -> Tensor:
        """The pre-activations of a [..., N, C] at ξ: a number, or one for each piece [P, 1, 1]."""
        return a @ (self.W - xi * self.D).mT + (self.b + xi * self.s)

    def carry(self, a: Jet, middle: Tensor, half: Tensor) -> Jet:
        """On pieces middle ± half [P, 1, 1]."""
        W = Interval.around(self.W - middle * self.D, half * self.D.abs())
        D, s = (Interval(still, still) for still in (self.D.expand_as(W.lo), self.s))
        twice = a.first.times(D)
        first = a.first.times(W) + (s - a.value.times(D))
        second = a.second.times(W) - (twice + twice)
        point = self.at(middle, a.point)
        return Jet(point, Interval.around(point, half * first.magnitude), first, second)


def output(layers: Sequence[Moving], x_NC: Tensor, xi: Tensor) -> Tensor:
    """o(ξ) of a network with tanh between its layers [N, K]."""
    a = layers[0].at(xi, x_NC)
    for layer in layers[1:]:
        a = layer.at(xi, a.tanh())
    return a


def remainder_bound(layers: Sequence[Moving], x_NC: Tensor, pieces: int) -> Tensor:
    """A bound on |o(1) − o(0) − o′(0)| [N, K]."""
    low = torch.arange(pieces, dtype=x_NC.dtype)[:, None, None] / pieces
    middle, half = low + 0.5 / pieces, torch.tensor(0.5 / pieces, dtype=x_NC.dtype)
    jet = layers[0].carry(Jet.of(x_NC.expand(pieces, -1, -1)), middle, half)
    for layer in layers[1:]:
        jet = layer.carry(jet.tanh(), middle, half)
    weight = ((1 - low).square() - (1 - low - 1 / pieces).square()) / 2  # ∫ (1 − ξ) dξ over the piece
    return (jet.second.magnitude * weight).sum(0)
