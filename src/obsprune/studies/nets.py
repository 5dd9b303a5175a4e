"""Small nets with one hidden layer and one output: many of them at once, trained to a minimum, and pruned step by step.

What has been pruned is a set of planes that the weights lie on, held by the projector onto the directions left free.
For deleted weights that is a diagonal mask. All in float64, and every net with the data of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

from obsprune.core.obs import hold, inverse_hessian, plane_costs, plane_step, sharing_planes
from obsprune.errors import InputError, nearest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
CONVERGED = 1e-9
"""Training is over when no net's gradient is longer than this."""


@dataclass(frozen=True)
class Shape:
    """inputs-hidden-1 with biases, a logistic output. The weights of one net are one vector: input weights unit by
    unit, biases of the units, output weights, output bias.
    """

    inputs: int
    hidden: int
    activation: str = "sigmoid"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise InputError(f"unknown activation '{self.activation}'; {nearest(self.activation, ACTIVATIONS)}")

    @property
    def weights(self) -> int:
        return self.hidden * (self.inputs + 2) + 1

    @property
    def units(self) -> list[list[int]]:
        """Where the weights into each unit stand in the vector, its bias last; the output is the last unit."""
        start = self.hidden * self.inputs
        into = [[*range(unit * self.inputs, (unit + 1) * self.inputs), start + unit] for unit in range(self.hidden)]
        return [*into, list(range(start + self.hidden, self.weights))]

    def output(self, w: Tensor, x: Tensor) -> Tensor:
        """From one net's weights [P] and one case [I] to one number."""
        into, bias, out, last = torch.split(w, [self.hidden * self.inputs, self.hidden, self.hidden, 1])
        units = ACTIVATIONS[self.activation](into.view(self.hidden, self.inputs) @ x + bias)
        return torch.sigmoid(out @ units + last[0])

    def start(self, seed: int, scale: float) -> Tensor:
        """Normal weights to train from [P], from a generator of its own."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(self.weights, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Task:
    """What B nets are asked: cases x [B, N, I], targets t [B, N] of 0 and 1; decay: λ of the weight decay."""

    shape: Shape
    x: Tensor
    t: Tensor
    decay: float = 0.0

    def only(self, nets: Tensor) -> Task:
        """The same for some of the nets."""
        return replace(self, x=self.x[nets], t=self.t[nets])

    def outputs(self, w: Tensor) -> Tensor:
        """[B, N]."""
        outputs: Tensor = vmap(vmap(self.shape.output, (None, 0)))(w, self.x)
        return outputs

    def gradients(self, w: Tensor) -> Tensor:
        """X = ∂o/∂w [B, N, P]."""
        gradients: Tensor = vmap(vmap(grad(self.shape.output), (None, 0)))(w, self.x)
        return gradients

    def error(self, w: Tensor) -> Tensor:
        """E = (1/2N) Σ (t − o)² [B]."""
        return (self.outputs(w) - self.t).square().mean(1) / 2

    def objective(self, w: Tensor) -> Tensor:
        """E + ½ λ ‖w‖², what training lowers [B]."""
        return self.error(w) + self.decay * w.square().sum(1) / 2

    def accuracy(self, w: Tensor) -> Tensor:
        """Percent of the cases answered rightly, 1 being an output above a half [B]; what is no number is wrong."""
        o = self.outputs(w)
        return 100 * torch.where(self.t > 0.5, o > 0.5, o <= 0.5).double().mean(1)

    def slope(self, w: Tensor) -> Tensor:
        """‖gradient of the objective‖: how far from a minimum [B]."""
        pull = ((self.outputs(w) - self.t)[:, None] @ self.gradients(w))[:, 0] / self.t.shape[1]
        slope: Tensor = (pull + self.decay * w).norm(dim=1)
        return slope

    def exact_hessian(self, w: Tensor) -> Tensor:
        """∂²E/∂w² with nothing left out [B, P, P]."""

        def error(w: Tensor, x: Tensor, t: Tensor) -> Tensor:
            return (vmap(self.shape.output, (None, 0))(w, x) - t).square().mean() / 2

        exact: Tensor = vmap(hessian(error))(w, self.x, self.t)
        return exact


@dataclass(frozen=True)
class Nets:
    """Weights w [B, P], and the projectors onto what is free in them [B, P, P]."""

    w: Tensor
    free: Tensor

    @classmethod
    def whole(cls, w: Tensor) -> Nets:
        """Nets of which nothing is pruned."""
        return cls(w, torch.eye(w.shape[1], dtype=w.dtype).repeat(len(w), 1, 1))

    @property
    def left(self) -> Tensor:
        """Degrees of freedom left, [B] whole numbers: weights, where only weights were deleted."""
        return self.free.diagonal(dim1=1, dim2=2).sum(1).round().long()

    def only(self, nets: Tensor) -> Nets:
        """Some of them."""
        return Nets(self.w[nets], self.free[nets])

    def where(self, chosen: Tensor, other: Nets) -> Nets:
        """These where `chosen` [B] is true, the others where it is not."""
        return Nets(self.w.where(chosen[:, None], other.w), self.free.where(chosen[:, None, None], other.free))


def train(task: Task, nets: Nets, steps: int) -> Nets:
    """Levenberg and Marquardt's steps within what is free, each net with a damping of its own; never uphill."""
    w, identity = nets.w, torch.eye(nets.w.shape[1], dtype=nets.w.dtype)
    damping, value = torch.full((len(w),), 0.01, dtype=w.dtype), task.objective(nets.w)
    for _ in range(steps):
        X = task.gradients(w) @ nets.free
        slope = ((task.outputs(w) - task.t)[:, None] @ X)[:, 0] / X.shape[1] + task.decay * w
        if bool((slope.norm(dim=1) < CONVERGED).all()):
            break
        curvature = X.mT @ X / X.shape[1] + (task.decay + damping)[:, None, None] * identity
        step: Tensor = torch.linalg.solve(curvature, slope)
        trial = w - (nets.free @ step[:, :, None])[:, :, 0]
        reached = task.objective(trial)
        better = reached < value
        w, value = trial.where(better[:, None], w), reached.where(better, value)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e6)
    return replace(nets, w=w)


Inverse = Callable[[Task, Nets, float], Tensor]
"""From the nets and α to what takes the place of H⁻¹ in choosing and adjusting, [B, P, P]."""


def gauss_newton(task: Task, nets: Nets, alpha: float) -> Tensor:
    """(αI + (1/N) Σ X Xᵀ)⁻¹ by the recursion over the patterns: the paper's."""
    X = task.gradients(nets.w) @ nets.free
    return inverse_hessian(X, X.shape[1], alpha)


def fisher(task: Task, nets: Nets, alpha: float) -> Tensor:
    """The same with gradients of the error, g = (o − t) X: (αI + (1/N) Σ g gᵀ / σ²)⁻¹, σ² = mean (o − t)² (the variance
    of the noise, under which the Fisher matrix estimates the Hessian of ½(o − t)²; and so α weighs as much as above).
    """
    residual = task.outputs(nets.w) - task.t
    scaled = residual / residual.square().mean(1, keepdim=True).sqrt()
    X = scaled[:, :, None] * task.gradients(nets.w) @ nets.free
    return inverse_hessian(X, X.shape[1], alpha)


def exact(task: Task, nets: Nets, alpha: float) -> Tensor:
    """(αI + ∂²E/∂w²)⁻¹ by elimination."""
    inverse: Tensor = torch.linalg.inv(_exact(task, nets, alpha))
    return inverse


def diagonal(task: Task, nets: Nets, alpha: float) -> Tensor:
    """Only the diagonal of Gauss and Newton's H: Optimal Brain Damage."""
    X = task.gradients(nets.w) @ nets.free
    return torch.diag_embed(1 / (X.square().mean(1) + alpha))


def exact_diagonal(task: Task, nets: Nets, alpha: float) -> Tensor:
    """Only the diagonal of the exact H: Optimal Brain Damage."""
    return torch.diag_embed(1 / _exact(task, nets, alpha).diagonal(dim1=1, dim2=2))


def identity(task: Task, nets: Nets, alpha: float) -> Tensor:
    """No curvature at all: magnitude."""
    return torch.eye(nets.w.shape[1], dtype=nets.w.dtype).expand_as(nets.free)


def _exact(task: Task, nets: Nets, alpha: float) -> Tensor:
    H = nets.free @ task.exact_hessian(nets.w) @ nets.free
    return H + alpha * torch.eye(H.shape[1], dtype=H.dtype)


def weights_alone(shape: Shape) -> Tensor:
    """The planes w_q = 0."""
    return torch.eye(shape.weights, dtype=torch.float64)


def weights_and_pairs(shape: Shape) -> Tensor:
    """The planes w_q = 0, and w_i = w_j and w_i = −w_j for any two weights into the same unit."""
    return torch.cat([weights_alone(shape), sharing_planes(shape.units, shape.weights)])


@dataclass(frozen=True)
class Criterion:
    """How the next degree of freedom to go is chosen, and how the other weights answer."""

    name: str
    inverse: Inverse
    planes: Callable[[Shape], Tensor] = weights_alone

    def remove(self, task: Task, nets: Nets, alpha: float) -> Nets:
        """One more plane held: of those not held yet the one of least cost, with the step that takes w there."""
        inverse = self.inverse(task, nets, alpha)
        planes = self.planes(task.shape) @ nets.free
        chosen = plane_costs(nets.w, inverse, planes).argmin(1)
        a = planes[torch.arange(len(chosen)), chosen]
        free = hold(nets.free, a)
        moved = nets.w + plane_step(nets.w, inverse, a)
        return Nets((free @ moved[:, :, None])[:, :, 0], free)  # projected once more: zero to the last bit


def path(criterion: Criterion, task: Task, nets: Nets, alpha: float) -> list[Nets]:
    """The nets as they are, then after each removal, without any retraining, until one degree of freedom is left."""
    found = [nets]
    for _ in range(nets.w.shape[1] - 1):
        found.append(criterion.remove(task, found[-1], alpha))
    return found


def prune(criterion: Criterion, task: Task, nets: Nets, floor: Tensor, alpha: float, retraining: int) -> Nets:
    """Removals, as long as the accuracy on the training cases is at least `floor` [B].

    A removal after which it is lower is followed by retraining (at most so many steps); if that does not bring it back,
    the removal is undone and the net is done.
    """
    running = nets.left > 1
    while bool(running.any()):
        trial = criterion.remove(task, nets, alpha)
        failed = (running & (task.accuracy(trial.w) < floor)).nonzero()[:, 0]
        if len(failed) and retraining:
            again = train(task.only(failed), trial.only(failed), retraining)
            trial = Nets(trial.w.index_copy(0, failed, again.w), trial.free)
        running = running & (task.accuracy(trial.w) >= floor)
        nets = trial.where(running, nets)
        running = running & (nets.left > 1)
    return nets


def at(way: Sequence[Nets], steps: Tensor) -> Nets:
    """Each net at a step of its own along a path [B]."""
    each = torch.arange(len(steps))
    return Nets(torch.stack([one.w for one in way])[steps, each], torch.stack([one.free for one in way])[steps, each])
