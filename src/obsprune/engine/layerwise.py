"""Layer-wise pruning: walk the model block by block, sum each matrix's inputs, solve, hand the pruned outputs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from obsprune.core.linalg import layer_loss, layer_loss_on_device
from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.engine.coverage import Coverage
from obsprune.engine.dealing import Deal
from obsprune.engine.inputs import measure, require_finite, shared_inputs
from obsprune.engine.matching import Matching
from obsprune.engine.norms import Renorm
from obsprune.engine.place import Dense, Place, Source, Store, Tensors
from obsprune.engine.rundir import RunDir
from obsprune.engine.streams import Batches, Measured, Stage, Streams
from obsprune.models.blocks import Block
from obsprune.models.load import Model
from obsprune.models.matrices import Matrix
from obsprune.models.walk import Stop
from obsprune.progress import Progress
from obsprune.ranks import Ranks
from obsprune.solvers.base import AnySolver, Solution


@dataclass(frozen=True)
class Pruned:
    """What became of one matrix, when it was solved: block matching comes later. error = loss / tr W H Wᵀ, the share of
    the output's energy that was lost.

    correction: how far its target was moved from W (0) to the corrected one (1); residual: whether that one makes up
    for what the residual stream has lost.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    sparsity: float
    loss: float
    error: float
    damping: float
    tokens: int
    seconds: float
    correction: float = 0.0
    residual: bool = False


@dataclass(frozen=True)
class Projection:
    """How a point becomes sparse: the layer solver, every matrix's pattern, and what becomes of starved experts."""

    solver: AnySolver
    patterns: Mapping[str, Pattern]
    coverage: Coverage = field(default_factory=Coverage)

    def dealt(self, group: Sequence[Matrix], gram: Gram) -> list[tuple[AnySolver, list[Matrix]]]:
        """The matrices by the solver that suits them: those with a bias, and those without."""
        solver = self.coverage.solver(self.solver, group, gram)
        solvers = {id(matrix): solver if matrix.bias is not None else solver.without_bias() for matrix in group}
        return [(s, [m for m in group if solvers[id(m)] is s]) for s in dict.fromkeys(solvers.values())]


@dataclass(frozen=True)
class After:
    """What is done with a block once its matrices are pruned."""

    matching: Matching | None
    reestimate: bool


def prune_blocks(
    model: Model,
    streams: Streams,
    projection: Projection,
    run: RunDir,
    progress: Progress,
    matching: Matching | None = None,
    reestimate: bool = False,
    efforts: Sequence[float] = (),
) -> None:
    """Prunes every matrix and commits block after block to `run`; blocks committed before are loaded instead.

    matching: what is done with each pruned block, where the streams have the dense block's outputs; reestimate: batch
    norms get new statistics; efforts: what each block costs beside the others, where that is known.
    """
    after = After(matching, reestimate)
    progress.stage("pruning", len(model.blocks), efforts)
    with model.walk(streams.batches) as walk:
        for stop in walk:
            block = model.blocks[stop.index]
            shard = run.ranks.told(partial(run.committed, block.name))
            if shard is not None:
                streams.pass_by(stop, block.loaded(model.device))
            with block.loaded(model.device, shard):
                if shard is None:
                    _prune_block(stop, block, streams, projection, run, progress, after)
                progress.step(run.summary(block.name), fresh=shard is None)
                if stop.last:
                    break  # nobody asks for what comes after the last block
                stop.hand_on(streams.sparse)


def _prune_block(
    stop: Stop,
    block: Block,
    streams: Streams,
    projection: Projection,
    run: RunDir,
    progress: Progress,
    after: After,
) -> None:
    start = time.perf_counter()
    results: list[Pruned] = []
    coverage = projection.coverage.measure(stop, streams.calibrating, block, streams.ranks)
    norms = Renorm.of(stop, streams.calibrating, streams.ranks) if after.reestimate else None
    for stage in streams.stages(stop, block.matrices):
        results += solve(stage, projection, lambda one: progress.detail(f"{one.name}  error {one.error:.4f}"))
    if norms and block.matrices:
        norms.apply(stop)
    matching = after.matching if block.matrices else None
    matched = asdict(matching(stop, block, streams.goals, streams.ranks, progress.detail)) if matching else None
    seconds = time.perf_counter() - start
    facts, tensors = {"matching": matched, "coverage": coverage}, block.tensors()
    run.commit(block.name, tensors, [asdict(result) for result in results], seconds, **facts)
    block.take(tensors)  # a run that is resumed here would read them, rounded


def solve(stage: Stage, projection: Projection, tell: Callable[[Pruned], None]) -> list[Pruned]:
    """Prunes the matrices of a stage, in place: each process its own, and all get the answers. Raises InputError when
    inputs were not finite.
    """
    ranks, own, found = stage.deal.ranks, stage.deal.own, list[Pruned]()

    def work() -> None:
        for measured in stage.measured:
            for result in _solve_group(measured, own(measured.group), projection):
                tell(result)
                found.append(result)

    ranks.agree(work)
    results = {result.name: result for part in ranks.gather(found) for result in part}
    matrices = [matrix for measured in stage.measured for matrix in measured.group]
    for matrix in matrices:
        source = stage.deal.owner[matrix.name]
        ranks.give(matrix.turn(matrix.weight), source)
        if matrix.bias is not None:
            ranks.give(matrix.bias.data[matrix.rows], source)
    return [results[matrix.name] for matrix in matrices]


def _solve_group(measured: Measured, own: Sequence[Matrix], projection: Projection) -> Iterator[Pruned]:
    gram = measured.gram
    if own:
        require_finite(gram)
    start = time.perf_counter()
    for solver, matrices in projection.dealt(own, gram) if own else ():
        state = solver.prepare(gram)
        for matrix in matrices:
            weight = matrix.read()
            point = measured.point(matrix, weight)
            solution = solver.solve(point, state, projection.patterns[matrix.name])
            end = time.perf_counter()
            known = point is weight and state.gram is gram and solution.bias_shift is None
            result = outcome(matrix, weight, solution, gram, end - start, solution.loss if known else None)
            matrix.write(solution.weight)  # last: `weight` may be a view of what it overwrites
            if matrix.bias is not None and solution.bias_shift is not None:
                matrix.bias.data[matrix.rows] += solution.bias_shift.to(matrix.bias.dtype)
            yield replace(result, correction=measured.share, residual=matrix in measured.writers)
            start = end


def project_blocks(
    place: Place, batches: Batches, projection: Projection, into: Store, point: Source
) -> dict[str, list[Pruned]]:
    """One shot into a store: every block's matrices are measured dense, on what the blocks before it, pruned, hand on;
    those of `point` are projected, whose biases and norms count too. Returns what became of them, by block.
    """
    results: dict[str, list[Pruned]] = {}
    with place.model.walk(batches) as walk:
        for stop in walk:
            with place.at(stop.index, point) as block:
                results[block.name] = _projected(stop, block, projection, point.get(block), place.model.ranks)
                carried = {name: tensor.clone() for name, tensor in block.carried.items()}
                into.put(block, carried | {matrix.name: matrix.read().clone() for matrix in block.matrices})
                if stop.last:
                    break
                stop.hand_on()
    return results


def _projected(stop: Stop, block: Block, projection: Projection, point: Tensors, ranks: Ranks) -> list[Pruned]:
    if not block.matrices:
        return []
    dense = Dense().get(block)
    block.write(point | {matrix.name: dense[matrix.name] for matrix in block.matrices})
    deal = Deal.of(block.matrices, ranks)
    found = measure(stop, shared_inputs(stop, block.matrices), ranks, deal)
    measured = [Measured(gram, group, lambda matrix, dense: point[matrix.name].to(dense)) for gram, group in found]
    return solve(Stage(measured, deal), projection, lambda result: None)


def layer_error(dense: Tensor, solution: Solution, gram: Gram) -> float:
    """How far the answer's outputs are from those of the dense weight: squared, summed over tokens."""
    lost_RC = dense.to(gram.H_CC.dtype) - solution.weight.to(gram.H_CC.dtype)
    loss = layer_loss(lost_RC, gram.H_CC)
    if solution.bias_shift is not None:  # ‖D X − b 1ᵀ‖²
        b_R = solution.bias_shift
        loss += float(gram.count * b_R.dot(b_R) - 2 * b_R.dot(lost_RC @ gram.sum_C))
    return loss


def outcome(
    matrix: Matrix, dense: Tensor, solution: Solution, gram: Gram, seconds: float, loss: float | None = None
) -> Pruned:
    """What the answer is worth beside the dense weight; loss: its `layer_error`, where that is known."""
    loss = layer_error(dense, solution, gram) if loss is None else loss
    zeros, energy = torch.stack([(solution.weight == 0).sum(), layer_loss_on_device(dense, gram.H_CC)]).tolist()
    return Pruned(
        name=matrix.name,
        shape=matrix.shape,
        zeros=int(zeros),
        sparsity=zeros / dense.numel(),
        loss=loss,
        error=loss / energy if energy else 0.0,
        damping=solution.damping,
        tokens=gram.count,
        seconds=seconds,
    )
