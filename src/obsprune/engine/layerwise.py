"""Layer-wise pruning: walk the model block by block, sum each matrix's inputs, solve, hand the pruned outputs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from obsprune.core.linalg import layer_loss
from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.engine.rundir import RunDir
from obsprune.errors import InputError
from obsprune.models.blocks import Block
from obsprune.models.load import Model
from obsprune.models.matrices import Matrix, Sink, observed
from obsprune.models.walk import Stop, Walk
from obsprune.progress import Progress
from obsprune.solvers.base import AnySolver, Solution

Identity = tuple[Any, ...]


@dataclass(frozen=True)
class Pruned:
    """What became of one matrix. error = loss / tr W H Wᵀ, the share of the output's energy that was lost."""

    name: str
    shape: tuple[int, int]
    zeros: int
    sparsity: float
    loss: float
    error: float
    damping: float
    tokens: int
    seconds: float


def prune_blocks(
    model: Model,
    batches: Sequence[Mapping[str, Tensor]],
    solver: AnySolver,
    patterns: Mapping[str, Pattern],
    run: RunDir,
    progress: Progress,
    true_sequential: bool = False,
) -> None:
    """Prunes every matrix and commits block after block to `run`; blocks committed before are loaded instead.

    true_sequential: measure again after each group of matrices with a common input, instead of once a block.
    """
    progress.stage("pruning", len(model.blocks))
    with Walk(model.network, [block.module for block in model.blocks], batches) as walk:
        for stop in walk:
            block = model.blocks[stop.index]
            shard = run.committed(block.name)
            with block.loaded(model.device, shard):
                if shard is None:
                    _prune_block(stop, block, solver, patterns, run, progress, true_sequential)
                progress.step(run.summary(block.name))
                if stop.last:
                    break  # nobody asks for what comes after the last block
                stop.hand_on()


def _prune_block(
    stop: Stop,
    block: Block,
    solver: AnySolver,
    patterns: Mapping[str, Pattern],
    run: RunDir,
    progress: Progress,
    true_sequential: bool,
) -> None:
    start = time.perf_counter()
    groups = shared_inputs(stop, block.matrices)
    results: list[Pruned] = []
    for part in [[group] for group in groups] if true_sequential else [groups]:
        for gram, group in measure(stop, part):
            for result in solve_group(gram, group, solver, patterns):
                progress.detail(f"{result.name}  error {result.error:.4f}")
                results.append(result)
    changed = {matrix.parameter for matrix in block.matrices}
    run.commit(block.name, block.tensors(changed), [asdict(result) for result in results], time.perf_counter() - start)


def identity(x: Tensor) -> Identity:
    """Equal for two matrices that are given the very same tensor, as long as both tensors are alive."""
    return (x.data_ptr(), x.shape, x.stride(), x._version)


def shared_inputs(stop: Stop, matrices: list[Matrix]) -> list[list[Matrix]]:
    """The matrices grouped by common input (q, k, v; gate, up), in order of first call, seen on one batch.

    Raises InputError for a matrix that the block never calls.
    """
    return grouped(calls_of(lambda: stop.run(stop.keys[0]), matrices, lambda matrix, x: None), matrices)


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
    """Lets `run` run a block; tells which tensors entered which matrix, in call order; shows each to `sink`."""
    calls: dict[Matrix, list[Identity]] = {}
    alive: list[Tensor] = []  # a freed tensor's address is used again at once

    def see(matrix: Matrix, x: Tensor) -> None:
        alive.append(x)
        calls.setdefault(matrix, []).append(identity(x))
        sink(matrix, x.detach())

    with observed(matrices, see):
        run()
    return calls


def measure(stop: Stop, groups: list[list[Matrix]]) -> Iterator[tuple[Gram, list[Matrix]]]:
    """One Gram for each group, over all batches. A group whose members turn out not to share is measured apart."""
    grams = _measure_together(stop, groups)
    if grams is None:
        groups = [[matrix] for group in groups for matrix in group]
        grams = _measure_together(stop, groups)
        assert grams is not None  # a group of one shares with itself
    yield from zip(grams, groups, strict=True)


def _measure_together(stop: Stop, groups: list[list[Matrix]]) -> list[Gram] | None:
    """The Grams of the groups, or None as soon as a batch shows that a group has more than one input."""
    grams = {group[0]: Gram(group[0].shape[1], group[0].name, group[0].device) for group in groups}

    def add(matrix: Matrix, x: Tensor) -> None:
        if matrix in grams:
            grams[matrix].add(matrix.tokens(x))

    for key in stop.keys:
        calls = calls_of(partial(stop.run, key), [matrix for group in groups for matrix in group], add)
        if any(calls.get(matrix) != calls.get(group[0]) for group in groups for matrix in group):
            return None
    return list(grams.values())


def solve_group(
    gram: Gram,
    group: list[Matrix],
    solver: AnySolver,
    patterns: Mapping[str, Pattern],
    point: Callable[[Matrix, Tensor], Tensor] = lambda matrix, dense: dense,
) -> Iterator[Pruned]:
    """Prunes the matrices that share one Gram, in place. Raises InputError when their inputs were not finite.

    point(matrix, its weight): what is projected, when it is not the weight itself.
    """
    require_finite(gram)
    start = time.perf_counter()
    state = solver.prepare(gram)
    for matrix in group:
        weight = matrix.read()
        solution = solver.solve(point(matrix, weight), state, patterns[matrix.name])
        end = time.perf_counter()
        result = outcome(matrix, weight, solution, gram, end - start)  # before `weight`, perhaps a view, is overwritten
        matrix.write(solution.weight)
        yield result
        start = end


def require_finite(gram: Gram) -> None:
    """Raises InputError when infinity or NaN was summed."""
    if not bool(torch.isfinite(gram.H_CC).all()):
        raise InputError(f"the inputs of {gram.name} are not finite; compute in a wider type (--dtype float32)")


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
