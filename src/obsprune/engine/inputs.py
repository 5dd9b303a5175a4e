"""What enters the matrices of a block: who shares an input, and the Gram of each distinct one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from obsprune.core.statistics import Gram
from obsprune.engine.dealing import Deal, add_up
from obsprune.errors import InputError, WalkMismatch
from obsprune.models.matrices import Matrix, Sink, observed
from obsprune.models.walk import Stop, in_turn
from obsprune.ranks import Ranks

Identity = tuple[Any, ...]
Run = Callable[[], None]


class Enough(Exception):
    """Raised by a sink inside a block's forward: all that is wanted of it has been seen, the rest need not run."""


@dataclass
class Quota:
    """So many things are wanted of a forward; `seen` raises Enough at the last one. 0: nobody knows how many."""

    left: int

    def seen(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Enough


def identity(matrix: Matrix, x: Tensor) -> Identity:
    """Equal for two matrices that see the same in the very same tensor, as long as both tensors are alive."""
    return (x.data_ptr(), x.shape, x.stride(), x._version, matrix.geometry)


def shared_inputs(stop: Stop, matrices: list[Matrix]) -> list[list[Matrix]]:
    """The matrices grouped by common input (q, k, v; gate, up), in order of first call, seen on one batch.

    Raises InputError for a matrix that the block never calls.
    """
    return grouped(first_calls(stop, matrices), matrices)


def first_calls(stop: Stop, matrices: list[Matrix]) -> dict[Matrix, list[Identity]]:
    """Which tensors of the first batch enter which matrix."""
    return calls_of(lambda: stop.run(stop.keys[0]), matrices, lambda matrix, x: None)


def grouped(calls: Mapping[Matrix, list[Identity]], matrices: list[Matrix]) -> list[list[Matrix]]:
    """The matrices that were given the very same tensors, together. Raises InputError for one that was given none."""
    silent = [matrix.name for matrix in matrices if matrix not in calls]
    if silent:
        raise InputError(f"{silent[0]} saw no calibration token; leave it dense with --skip '{silent[0]}'")
    groups: dict[tuple[Identity, ...], list[Matrix]] = {}
    for matrix, inputs in calls.items():
        groups.setdefault(tuple(inputs), []).append(matrix)
    return list(groups.values())


def calls_of(run: Callable[[], Any], matrices: list[Matrix], sink: Sink) -> dict[Matrix, list[Identity]]:
    """Lets `run` run a block; tells which tensors entered which matrix, in call order; shows each to `sink`.

    The sink may end the forward by raising Enough.
    """
    calls: dict[Matrix, list[Identity]] = {}
    alive: list[Tensor] = []  # a freed tensor's address is used again at once

    def see(matrix: Matrix, x: Tensor) -> None:
        alive.append(x)
        calls.setdefault(matrix, []).append(identity(matrix, x))
        sink(matrix, x.detach())

    with observed(matrices, see), suppress(Enough):
        run()
    return calls


def measure(
    stop: Stop, groups: list[list[Matrix]], ranks: Ranks, deal: Deal | None = None
) -> list[tuple[Gram, list[Matrix]]]:
    """One Gram for each group, over all batches of all processes; whole where a matrix of the group is to be solved,
    without a deal everywhere. A group whose members turn out not to share is measured apart.
    """
    grams = _measure_together(stop, groups)
    if any(ranks.gather(grams is None)):
        groups = [[matrix] for group in groups for matrix in group]
        grams = _measure_together(stop, groups)
    assert grams is not None  # a group of one shares with itself
    found = list(zip(grams, groups, strict=True))
    add_up(ranks, ((gram, deal.owners(group) if deal else ()) for gram, group in found))
    return found


def _measure_together(stop: Stop, groups: list[list[Matrix]]) -> list[Gram] | None:
    """The Grams of the groups, or None as soon as a batch shows that a group has more than one input. A forward ends
    with the last call of a matrix, but for the first one, which counts them.
    """
    grams = {group[0]: Gram(group[0].shape[1], group[0].name, group[0].device) for group in groups}
    matrices, wanted = [matrix for group in groups for matrix in group], 0

    def add(quota: Quota, matrix: Matrix, x: Tensor) -> None:
        if matrix in grams:
            for x_TC in matrix.tokens(x):
                grams[matrix].add(x_TC)
        quota.seen()

    for key, then in in_turn(stop.keys):
        calls = calls_of(partial(stop.run, key, then=then), matrices, partial(add, Quota(wanted)))
        wanted = sum(map(len, calls.values()))
        if any(calls.get(matrix) != calls.get(group[0]) for group in groups for matrix in group):
            return None
    return list(grams.values())


class NotFinite(InputError):
    """Inputs or a gradient hold infinity or NaN: the numbers are too large for the dtype, or a learning rate was."""


def require_finite(gram: Gram) -> None:
    """Raises NotFinite when infinity or NaN was summed."""
    if not bool(torch.isfinite(gram.H_CC).all()):
        raise NotFinite(f"the inputs of {gram.name} are not finite; compute in a wider type (--dtype float32)")


def distinct_inputs(
    run: Callable[[], Any], matrices: list[Matrix], sink: Sink, called: Callable[[], None] = lambda: None
) -> list[list[Matrix]]:
    """Lets `run` run a block; shows each distinct input to `sink`, for the first matrix it enters (the leader);
    returns the matrices that share their inputs, the leader first. `called` is called after every call of a matrix.
    """
    leaders: dict[Identity, Matrix] = {}

    def see(matrix: Matrix, x: Tensor) -> None:
        if leaders.setdefault(identity(matrix, x), matrix) is matrix:
            with torch.no_grad():
                sink(matrix, x)
        called()

    return grouped(calls_of(run, matrices, see), matrices)


@dataclass
class Inputs:
    """The Grams of one block's matrices, one for each distinct input, and who shares it."""

    matrices: list[Matrix]
    groups: list[list[Matrix]] = field(default_factory=list)
    grams: dict[Matrix, Gram] = field(default_factory=dict)

    def observe(
        self,
        run: Callable[[], Any],
        also: Sink = lambda matrix, x: None,
        called: Callable[[], None] = lambda: None,
    ) -> None:
        """Adds what enters the matrices while `run` runs. Raises WalkMismatch when the sharing changes.

        also(matrix, x): called with each distinct input, for the first matrix it enters; called(): after every call
        of a matrix.
        """

        def add(matrix: Matrix, x: Tensor) -> None:
            gram = self.grams.setdefault(matrix, Gram(matrix.shape[1], matrix.name, matrix.device))
            for x_TC in matrix.tokens(x):
                gram.add(x_TC)
            also(matrix, x)

        groups = distinct_inputs(run, self.matrices, add, called)
        self.groups = self.groups or groups
        if groups != self.groups or {group[0] for group in groups} != set(self.grams):
            name = groups[0][0].name
            raise WalkMismatch(f"who shares the input of {name} changes from batch to batch; this is unsupported")

    def add_up(self, deal: Deal) -> None:
        """Over all processes, for those who solve a matrix. Raises WalkMismatch when they share inputs otherwise."""
        names = [[matrix.name for matrix in group] for group in self.groups]
        if any(other != names for other in deal.ranks.gather(names)):
            raise WalkMismatch(f"who shares the input of {names[0][0]} differs between processes; this is unsupported")
        add_up(deal.ranks, ((self.grams[group[0]], deal.owners(group)) for group in self.groups))

    def shared(self) -> list[tuple[Gram, list[Matrix]]]:
        """Each Gram with the matrices it belongs to."""
        return [(self.grams[group[0]], group) for group in self.groups]
