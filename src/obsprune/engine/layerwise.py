"""Layer-wise pruning: walk the model block by block, sum each matrix's inputs, solve, hand the pruned outputs on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from obsprune.core.linalg import layer_loss
from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.engine.inputs import require_finite
from obsprune.engine.rundir import RunDir
from obsprune.engine.streams import Measured, Streams
from obsprune.models.blocks import Block
from obsprune.models.load import Model
from obsprune.models.matrices import Matrix
from obsprune.models.walk import Stop, Walk
from obsprune.progress import Progress
from obsprune.solvers.base import AnySolver, Solution


@dataclass(frozen=True)
class Pruned:
    """What became of one matrix. error = loss / tr W H Wᵀ, the share of the output's energy that was lost.

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


def prune_blocks(
    model: Model,
    streams: Streams,
    solver: AnySolver,
    patterns: Mapping[str, Pattern],
    run: RunDir,
    progress: Progress,
) -> None:
    """Prunes every matrix and commits block after block to `run`; blocks committed before are loaded instead."""
    progress.stage("pruning", len(model.blocks))
    with Walk(model.network, [block.module for block in model.blocks], streams.batches) as walk:
        for stop in walk:
            block = model.blocks[stop.index]
            shard = run.committed(block.name)
            if shard is not None:
                streams.pass_by(stop, block.loaded(model.device))
            with block.loaded(model.device, shard):
                if shard is None:
                    _prune_block(stop, block, streams, solver, patterns, run, progress)
                progress.step(run.summary(block.name))
                if stop.last:
                    break  # nobody asks for what comes after the last block
                stop.hand_on(streams.sparse)


def _prune_block(
    stop: Stop,
    block: Block,
    streams: Streams,
    solver: AnySolver,
    patterns: Mapping[str, Pattern],
    run: RunDir,
    progress: Progress,
) -> None:
    start = time.perf_counter()
    results: list[Pruned] = []
    for measured in streams.measured(stop, block.matrices):
        for result in solve_group(measured, solver, patterns):
            progress.detail(f"{result.name}  error {result.error:.4f}")
            results.append(result)
    changed = {matrix.parameter for matrix in block.matrices}
    run.commit(block.name, block.tensors(changed), [asdict(result) for result in results], time.perf_counter() - start)


def solve_group(measured: Measured, solver: AnySolver, patterns: Mapping[str, Pattern]) -> Iterator[Pruned]:
    """Prunes the matrices that share one Gram, in place. Raises InputError when their inputs were not finite."""
    gram = measured.gram
    require_finite(gram)
    start = time.perf_counter()
    state = solver.prepare(gram)
    for matrix in measured.group:
        weight = matrix.read()
        solution = solver.solve(measured.point(matrix, weight), state, patterns[matrix.name])
        end = time.perf_counter()
        result = outcome(matrix, weight, solution, gram, end - start)
        matrix.write(solution.weight)  # last: `weight` may be a view of what it overwrites
        yield replace(result, correction=measured.share, residual=matrix in measured.writers)
        start = end


def outcome(matrix: Matrix, dense: Tensor, solution: Solution, gram: Gram, seconds: float) -> Pruned:
    """What the answer is worth beside the dense weight."""
    zeros, energy = int((solution.weight == 0).sum()), layer_loss(dense, gram.H_CC)
    loss = layer_loss(dense.to(gram.H_CC.dtype) - solution.weight.to(gram.H_CC.dtype), gram.H_CC)
    return Pruned(
        name=matrix.name,
        shape=matrix.shape,
        zeros=zeros,
        sparsity=zeros / dense.numel(),
        loss=loss,
        error=loss / energy if energy else 0.0,
        damping=solution.damping,
        tokens=gram.count,
        seconds=seconds,
    )
