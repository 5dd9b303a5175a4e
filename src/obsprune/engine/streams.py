"""How calibration passes the blocks: through the pruned model alone, or through the dense one beside it.

With one stream a layer is asked to keep its own output on the inputs it gets. With two, a layer of the pruned model is
asked for the output that the dense model's layer has on *its* inputs (core/targets.py): errors of earlier blocks are
repaired instead of passed on. How far to go is judged on held-out sequences, for each group of matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor

from obsprune.core.statistics import Cross, Gram
from obsprune.core.targets import SHARES, corrected, mismatch
from obsprune.engine.inputs import Identity, Inputs, Run, calls_of, identity, measure, shared_inputs
from obsprune.models.matrices import Matrix, exchanged
from obsprune.models.walk import Stop

Point = Callable[[Matrix, Tensor], Tensor]
Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Measured:
    """A Gram, the matrices it belongs to, what the solver is to approximate for each, and how far that is from W."""

    gram: Gram
    group: list[Matrix]
    point: Point = lambda matrix, dense: dense
    share: float = 0.0


class Streams(ABC):
    """Batches on their way. batches: all that walk; sparse: those of them that see the pruned blocks."""

    batches: Batches
    sparse: Sequence[int]

    @abstractmethod
    def measured(self, stop: Stop, matrices: list[Matrix]) -> Iterator[Measured]:
        """What the solver needs for each group of matrices; the block has its dense weights, and each group's new ones
        are in place before the next is asked for.
        """

    @abstractmethod
    def pass_by(self, stop: Stop, loaded: AbstractContextManager[None]) -> None:
        """Sends on the batches that need the dense weights (in place while `loaded` is open) of a block done before."""


@final
class OneStream(Streams):
    """The pruned model alone. true_sequential: measure again after each group, instead of once a block."""

    def __init__(self, batches: Batches, true_sequential: bool = False) -> None:
        self.batches, self.sparse, self.true_sequential = batches, range(len(batches)), true_sequential

    def measured(self, stop: Stop, matrices: list[Matrix]) -> Iterator[Measured]:
        groups = shared_inputs(stop, matrices)
        for part in [[group] for group in groups] if self.true_sequential else [groups]:
            for gram, group in measure(stop, part):
                yield Measured(gram, group)

    def pass_by(self, stop: Stop, loaded: AbstractContextManager[None]) -> None:
        """All batches see the pruned block."""


@dataclass
class _Pairs:
    """Sums over one set of batches for one group of matrices: the Gram of the pruned model's inputs x, and K = Σ y xᵀ
    with the dense model's inputs y.
    """

    inputs: Inputs
    crosses: dict[Matrix, Cross] = field(default_factory=dict)

    def observe(self, dense: Run, sparse: Run) -> None:
        """Runs the block on one batch of both streams."""
        seen: dict[Matrix, list[Tensor]] = {}
        leaders: dict[Identity, Matrix] = {}

        def keep(matrix: Matrix, x: Tensor) -> None:
            if leaders.setdefault(identity(x), matrix) is matrix:
                seen.setdefault(matrix, []).append(matrix.tokens(x).clone())  # a block may change it in place later

        calls_of(dense, self.inputs.matrices, keep)

        def pair(matrix: Matrix, x_TC: Tensor) -> None:
            columns = matrix.shape[1]
            cross = self.crosses.setdefault(matrix, Cross(columns, columns, matrix.device))
            cross.add(seen[matrix].pop(0), x_TC)

        self.inputs.observe(sparse, pair)


@final
class TwoStreams(Streams):
    """Calibration and judging batches, each in the dense and in the pruned model; always group after group, so that the
    error of a group is seen, and repaired, by the next.
    """

    def __init__(self, batches: Batches, judges: Batches, damping: float) -> None:
        both = [*batches, *judges]
        self.batches, self.count, self.first_judge = [*both, *both], len(both), len(batches)
        self.sparse = range(len(both), 2 * len(both))
        self.damping = damping

    def measured(self, stop: Stop, matrices: list[Matrix]) -> Iterator[Measured]:
        dense = {matrix: matrix.weight.clone() for matrix in matrices}
        for group in shared_inputs(stop, matrices):
            work, judge = _Pairs(Inputs(group)), _Pairs(Inputs(group))
            for key in range(self.count):
                pairs = work if key < self.first_judge else judge
                pairs.observe(partial(_run_with, dense, stop, key), partial(stop.run, self.count + key))
            yield self._measured(work, judge)
        with exchanged(dense):
            stop.hand_on(range(self.count))

    def _measured(self, work: _Pairs, judge: _Pairs) -> Measured:
        """The group's targets, moved by the share that fits the judging sequences best."""
        ((gram, group),), ((judging, _),) = work.inputs.shared(), judge.inputs.shared()
        (cross,), (judged,) = work.crosses.values(), judge.crosses.values()
        weights = {matrix: matrix.read().to(gram.H_CC) for matrix in group}
        targets = {
            matrix: corrected(W_RC, W_RC @ cross.K_RC, gram.H_CC, self.damping) for matrix, W_RC in weights.items()
        }

        def error(share: float) -> float:
            return sum(
                mismatch(torch.lerp(W_RC, targets[matrix], share), W_RC @ judged.K_RC, judging.H_CC)
                for matrix, W_RC in weights.items()
            )

        share = min(SHARES, key=error)
        return Measured(gram, group, lambda matrix, dense: torch.lerp(weights[matrix], targets[matrix], share), share)

    def pass_by(self, stop: Stop, loaded: AbstractContextManager[None]) -> None:
        with loaded:
            stop.hand_on(range(self.count))


def _run_with(weights: Mapping[Matrix, Tensor], stop: Stop, key: int) -> None:
    with exchanged(weights):
        stop.run(key)
