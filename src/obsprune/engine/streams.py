"""How calibration passes the blocks: through the pruned model alone, or through the dense one beside it.

With one stream a layer is asked to keep its own output on the inputs it gets. With two, a layer of the pruned model is
asked for the output that the dense model's layer has on *its* inputs (core/targets.py): errors of earlier layers are
repaired instead of passed on. A layer that writes to the residual stream is also asked for what the stream itself has
lost on the way. How far to go is judged on held-out sequences, for each group of matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from obsprune.core.statistics import SUM, Cross, Gram
from obsprune.core.targets import MOST, best_share, correction, gain_and_cost
from obsprune.engine.dealing import Deal, add_up, total
from obsprune.engine.inputs import Inputs, Quota, distinct_inputs, first_calls, grouped, measure, shared_inputs
from obsprune.engine.matching import Goals
from obsprune.models.activations import free_bytes
from obsprune.models.experts import experts_of, following, routes
from obsprune.models.matrices import Matrix, copies, exchanged
from obsprune.models.residual import Junction, find_junctions, watched
from obsprune.models.walk import Stop, in_turn
from obsprune.ranks import ALONE, Ranks

Point = Callable[[Matrix, Tensor], Tensor]
Batches = Sequence[Mapping[str, Tensor]]
SHARE = 0.25
"""Of the free memory, for the statistics of matrices that are measured together."""
PAIRED = 4
"""Sums of about a Gram's size for each group of two streams: Gram and cross, to calibrate and to judge."""


@dataclass(frozen=True)
class Stage:
    """What can be solved at the same time, and by whom."""

    measured: list[Measured]
    deal: Deal


@dataclass(frozen=True)
class Measured:
    """A Gram, the matrices it belongs to, and what the solver is to approximate for each: known where it is solved.

    share: how far that is from W to the corrected target; writers: which of them also repair the residual stream.
    """

    gram: Gram
    group: list[Matrix]
    point: Point = lambda matrix, dense: dense
    share: float = 0.0
    writers: frozenset[Matrix] = frozenset()


class Streams(ABC):
    """Batches of this process on their way. batches: all that walk; sparse: those of them that see the pruned blocks;
    calibrating: those of these that are not there to judge.
    """

    ranks: Ranks
    batches: Batches
    sparse: Sequence[int]
    calibrating: Sequence[int]
    goals: Goals = Goals()
    """What the dense block gave, where there is a dense stream: known when `stages` is through."""

    @abstractmethod
    def stages(self, stop: Stop, matrices: list[Matrix]) -> Iterator[Stage]:
        """What the solver needs for the groups of matrices; the block has its dense weights, and the new ones of a
        stage are in place before the next is asked for.
        """

    @abstractmethod
    def pass_by(self, stop: Stop, loaded: AbstractContextManager[None]) -> None:
        """Sends on the batches that need the dense weights (in place while `loaded` is open) of a block done before."""


@final
class OneStream(Streams):
    """The pruned model alone. true_sequential: measure again after each layer, instead of once a block."""

    def __init__(self, batches: Batches, true_sequential: bool = False, ranks: Ranks = ALONE) -> None:
        self.batches, self.true_sequential, self.ranks = batches, true_sequential, ranks
        self.sparse = self.calibrating = range(len(batches))

    def stages(self, stop: Stop, matrices: list[Matrix]) -> Iterator[Stage]:
        groups = shared_inputs(stop, matrices)
        for side_by_side in together(groups) if self.true_sequential else [groups]:
            parts = few_at_a_time(side_by_side, 1, self.ranks)
            dense = copies(matrices) if len(parts) > 1 else {}  # later parts must not see the earlier ones pruned
            for part in parts:
                deal = Deal.of(flat(part), self.ranks)
                with exchanged(dense):
                    measured = measure(stop, part, self.ranks, deal)
                yield Stage([Measured(gram, group) for gram, group in measured], deal)

    def pass_by(self, stop: Stop, loaded: AbstractContextManager[None]) -> None:
        """All batches see the pruned block."""


@dataclass
class _Pairs:
    """Sums over one set of batches for one group of matrices: the Gram of the pruned model's inputs x, Σ (y − x) xᵀ
    with the dense model's inputs y, and for each matrix that writes to the residual stream Σ (g − h) xᵀ, g and h the
    stream before it in the dense and in the pruned model, in units of the matrix's output.

    wanted: calls of the matrices in one forward, and junctions behind them; the forward ends with the last of these.
    """

    inputs: Inputs
    junctions: Mapping[Matrix, Junction]
    wanted: int
    crosses: dict[Matrix, Cross] = field(default_factory=dict)
    residuals: dict[Matrix, Cross] = field(default_factory=dict)

    def observe(self, block: nn.Module, dense: Callable[[], Any], sparse: Callable[[], Any]) -> None:
        """Runs the block on one batch of both streams."""
        y: dict[Matrix, list[Tensor]] = {}
        x: dict[Matrix, list[Tensor]] = {}
        g: dict[Matrix, list[Tensor]] = {}
        h: dict[Matrix, list[Tensor]] = {}
        quota = Quota(self.wanted)
        with self._watched(block, h, quota) as returned, routes(experts_of(self.inputs.matrices)) as chosen:
            self.inputs.observe(lambda: returned(sparse()), partial(_collect, x), quota.seen)
        quota = Quota(self.wanted)
        with self._watched(block, g, quota) as returned, following(chosen):  # the same tokens, whoever gets them here
            distinct_inputs(lambda: returned(dense()), self.inputs.matrices, partial(_collect, y), quota.seen)
        for group in self.inputs.groups:
            leader = group[0]
            for dense_input, sparse_input in zip(y[leader], x[leader], strict=True):
                cross = self._cross(self.crosses, leader, leader.shape[1])
                for y_TC, x_TC in zip(leader.tokens(dense_input), leader.tokens(sparse_input), strict=True):
                    cross.add(y_TC.float() - x_TC, x_TC)
            for matrix in (matrix for matrix in group if matrix in self.junctions):
                for g_TR, h_TR, sparse_input in zip(g[matrix], h[matrix], x[leader], strict=True):
                    self._add_residual(matrix, g_TR - h_TR, leader.tokens(sparse_input))

    def _add_residual(self, matrix: Matrix, lost_TR: Tensor, pieces: Iterable[Tensor]) -> None:
        cross, start = self._cross(self.residuals, matrix, matrix.shape[0]), 0
        for x_TC in pieces:
            cross.add(lost_TR[start : start + len(x_TC)], x_TC)
            start += len(x_TC)

    def _watched(
        self, block: nn.Module, into: dict[Matrix, list[Tensor]], quota: Quota
    ) -> AbstractContextManager[Callable[[Any], None]]:
        def note(matrix: Matrix, tokens: Tensor) -> None:
            _collect(into, matrix, tokens)
            quota.seen()

        return watched(block, self.junctions, note)

    def add_up(self, deal: Deal) -> None:
        """Over all processes, for those who solve a matrix."""
        groups = [(self.crosses[group[0]], deal.owners(group)) for group in self.inputs.groups]
        self.inputs.add_up(deal)
        add_up(deal.ranks, [*groups, *((cross, deal.owners([matrix])) for matrix, cross in self.residuals.items())])

    def _cross(self, table: dict[Matrix, Cross], matrix: Matrix, rows: int) -> Cross:
        return table.setdefault(matrix, Cross(rows, matrix.shape[1], matrix.device))

    def missing(self, matrix: Matrix, leader: Matrix, W_RC: Tensor) -> Tensor:
        """D_RC = Σ (t − W x) xᵀ with t what the matrix should give."""
        D_RC = W_RC @ self.crosses[leader].K_RC
        return D_RC + self.residuals[matrix].K_RC if matrix in self.residuals else D_RC


def together(groups: list[list[Matrix]]) -> list[list[list[Matrix]]]:
    """The groups that do not see one another: those of one parameter (the filters of a convolution, the experts of a
    mixture).
    """
    parameters: dict[str, list[list[Matrix]]] = {}
    for group in groups:
        parameters.setdefault(group[0].parameter, []).append(group)
    return list(parameters.values())


def flat(groups: list[list[Matrix]]) -> list[Matrix]:
    """All matrices of some groups."""
    return [matrix for group in groups for matrix in group]


def few_at_a_time(groups: list[list[Matrix]], sums: int, ranks: Ranks) -> list[list[list[Matrix]]]:
    """The groups in parts whose statistics take a share of the free memory; sums: of the size of a Gram, for each."""
    budget = SHARE * min(ranks.gather(free_bytes(groups[0][0].device))) if groups else 0
    parts: list[list[list[Matrix]]] = []
    left = 0.0
    for group in groups:
        needed = sums * SUM.itemsize * group[0].shape[1] ** 2
        if needed > left:
            parts.append([])
            left = budget
        parts[-1].append(group)
        left -= needed
    return parts


def _collect(into: dict[Matrix, list[Tensor]], matrix: Matrix, tokens: Tensor) -> None:
    into.setdefault(matrix, []).append(tokens.clone())  # a block may change in place what it gave away


@final
class TwoStreams(Streams):
    """Calibration and judging batches, each in the dense and in the pruned model; always group after group, so that the
    error of a group is seen, and repaired, by the next. most: how far a target may be moved; 0 asks for no correction,
    and the dense stream walks for its blocks' outputs alone.
    """

    def __init__(
        self,
        batches: Batches,
        judges: Batches,
        damping: float,
        residual: bool,
        most: float = MOST,
        ranks: Ranks = ALONE,
    ) -> None:
        both = [*batches, *judges]
        self.batches, self.count, self.first_judge = [*both, *both], len(both), len(batches)
        self.sparse = range(len(both), 2 * len(both))
        self.calibrating = self.sparse[: len(batches)]
        self.damping, self.residual, self.most, self.ranks = damping, residual, most, ranks

    def stages(self, stop: Stop, matrices: list[Matrix]) -> Iterator[Stage]:
        self.goals = Goals()  # of the block before: no longer needed
        dense = copies(matrices)
        junctions = self._junctions(stop, matrices) if self.residual else {}
        calls = first_calls(stop, matrices)
        for part in self._parts(grouped(calls, matrices)):
            wanted = sum(len(calls[matrix]) for matrix in part)
            if not self.most:
                yield self._own(stop, part, wanted)
                continue
            own = {matrix: junctions[matrix] for matrix in part if matrix in junctions}
            wanted += sum(len(calls[matrix]) for matrix in own)
            work, judge = _Pairs(Inputs(part), own, wanted), _Pairs(Inputs(part), own, wanted)
            for key, then in in_turn(range(self.count)):
                pairs, beside = work if key < self.first_judge else judge, self.count + key
                one = partial(_run_with, dense, stop, key, beside)
                pairs.observe(stop.module, one, partial(stop.run, beside, then=then))
            yield self._corrected(work, judge)
        outputs: dict[int, Any] = {}
        with exchanged(dense):
            for key, then in in_turn(range(self.count)):
                outputs[self.count + key] = output = stop.run(key, then=then)
                stop.leave(key, output)
                stop.keep(output)
        edge = self.count + self.first_judge
        self.goals = Goals(
            {key: goal for key, goal in outputs.items() if key < edge},
            {key: goal for key, goal in outputs.items() if key >= edge},
        )

    def _parts(self, groups: list[list[Matrix]]) -> list[list[Matrix]]:
        """The matrices that are measured in one go."""
        sums = PAIRED if self.most else 1
        parts = [part for side_by_side in together(groups) for part in few_at_a_time(side_by_side, sums, self.ranks)]
        return [flat(part) for part in parts]

    def _junctions(self, stop: Stop, matrices: list[Matrix]) -> dict[Matrix, Junction]:
        """As the first process finds them: it is a matter of measuring, and all must go by the same."""
        modules = dict(stop.module.named_modules())
        names = {module: name for name, module in modules.items()}

        def find() -> dict[str, tuple[str, Junction]]:
            found = find_junctions(stop.module, matrices, stop.call(0))
            return {matrix.name: (names[place.module], place.apart()) for matrix, place in found.items()}

        told = self.ranks.told(find)
        own = {matrix: told[matrix.name] for matrix in matrices if matrix.name in told}
        return {matrix: place.at(modules[name], matrix.device) for matrix, (name, place) in own.items()}

    def _own(self, stop: Stop, matrices: list[Matrix], wanted: int) -> Stage:
        """They are asked for their own output: only the pruned model's inputs count."""
        inputs = Inputs(matrices)
        for key in range(self.first_judge):
            inputs.observe(partial(stop.run, self.count + key), called=Quota(wanted).seen)
        deal = Deal.of(matrices, self.ranks)
        inputs.add_up(deal)
        return Stage([Measured(gram, group) for gram, group in inputs.shared()], deal)

    def _corrected(self, work: _Pairs, judge: _Pairs) -> Stage:
        """Targets moved as far as fits the judging samples best, for each group."""
        deal = Deal.of(work.inputs.matrices, self.ranks)
        work.add_up(deal)
        judge.add_up(deal)
        groups = work.inputs.groups
        moves = self.ranks.agree(lambda: [self._moves(work, judge, group[0], deal.own(group)) for group in groups])
        gains = total(self.ranks, [number for move in moves for number in (move.gain, move.cost)])
        shares = [best_share(gain, cost, self.most) for gain, cost in zip(gains[::2], gains[1::2], strict=True)]
        writers = frozenset(work.residuals)
        measured = [
            Measured(work.inputs.grams[group[0]], group, partial(_target, move.of, share), share, writers)
            for group, move, share in zip(groups, moves, shares, strict=True)
        ]
        return Stage(measured, deal)

    def _moves(self, work: _Pairs, judge: _Pairs, leader: Matrix, own: list[Matrix]) -> _Moves:
        H_CC, judging_CC = work.inputs.grams[leader].H_CC, judge.inputs.grams[leader].H_CC
        weights = {matrix: matrix.read().to(H_CC) for matrix in own}
        moves = {
            matrix: correction(work.missing(matrix, leader, W_RC), H_CC, self.damping)
            for matrix, W_RC in weights.items()
        }
        judged = [(moves[matrix], judge.missing(matrix, leader, W_RC), judging_CC) for matrix, W_RC in weights.items()]
        return _Moves(moves, *gain_and_cost(judged))

    def pass_by(self, stop: Stop, loaded: AbstractContextManager[None]) -> None:
        with loaded:
            stop.hand_on(range(self.count))


@dataclass(frozen=True)
class _Moves:
    """From W to the corrected target for each matrix of a group that this process solves, and what judges them all."""

    of: dict[Matrix, Tensor]
    gain: float
    cost: float


def _target(moves: Mapping[Matrix, Tensor], share: float, matrix: Matrix, dense: Tensor) -> Tensor:
    move_RC = moves[matrix]
    return dense.to(move_RC) + share * move_RC


def _run_with(weights: Mapping[nn.Parameter, Tensor], stop: Stop, key: int, then: int) -> Any:
    with exchanged(weights):
        return stop.run(key, then=then)
