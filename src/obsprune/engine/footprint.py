"""Bytes that parts of a run hold at once, by arithmetic on shapes; what crosses the blocks and what a graph keeps is
looked at on one sample (docs/scaling.md, "Memory").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from obsprune.core.statistics import SUM
from obsprune.engine.inputs import shared_inputs
from obsprune.engine.short_walk import Kind, count_kinds, floats, kind_of_block, short_walk
from obsprune.engine.streams import PAIRED, SHARE, together
from obsprune.models.blocks import Block
from obsprune.models.load import Model
from obsprune.models.matrices import Matrix, differentiated
from obsprune.models.samples import Batch
from obsprune.models.walk import Stop
from obsprune.solvers.base import AnySolver

LEARNER = 7.25
"""Float32 numbers that block matching holds for each weight it tunes: the master, two moments, the best state and the
next, the gradient, one in passing; and the mask, a byte."""


@dataclass(frozen=True)
class Shapes:
    """One kind of block. elements: of all its parameters; prunable: of its matrices; groups: those that share a Gram,
    those of one parameter side by side; call, graph: bytes of one sample that enter it, and that its graph keeps;
    flops: of its forward on one sample.
    """

    elements: int
    prunable: int
    groups: Sequence[Sequence[Sequence[tuple[int, int]]]]
    call: int
    graph: int
    flops: int

    def grams(self, sums: int) -> list[int]:
        """Of each group of matrices, `sums` of the size of a Gram."""
        return [sums * SUM.itemsize * group[0][1] ** 2 for side in self.groups for group in side]

    def one_stream(self, true_sequential: bool, free: int) -> int:
        """Grams that are measured together: of the whole block, or of what lies side by side, a share of what is free
        at most (but one Gram at least).
        """
        sides = [sum(SUM.itemsize * group[0][1] ** 2 for group in side) for side in self.groups]
        wanted = max(sides, default=0) if true_sequential else sum(sides)
        return min(wanted, max(int(SHARE * free), *self.grams(1), 0))

    def two_streams(self, free: int) -> int:
        """The sums of one group, or of those side by side; and the moved targets of its matrices."""
        sides = [sum(PAIRED * SUM.itemsize * group[0][1] ** 2 for group in side) for side in self.groups]
        moved = [2 * SUM.itemsize * sum(r * c for r, c in group) for side in self.groups for group in side]
        return min(max(sides, default=0), max(int(SHARE * free), *self.grams(PAIRED), 0)) + max(moved, default=0)

    def solving(self, solver: AnySolver) -> int:
        """What a solver holds for one matrix."""
        squares, rectangles = solver.workspace
        shapes = [shape for side in self.groups for group in side for shape in group]
        return max((SUM.itemsize * (squares * c * c + rectangles * r * c) for r, c in shapes), default=0)


def shapes(model: Model, sample: Batch) -> dict[Kind, Shapes]:
    """Every kind of block, looked at with one sample."""
    found: dict[Kind, Shapes] = {}

    def visit(stop: Stop, block: Block) -> dict[int, Any]:
        groups = together(shared_inputs(stop, block.matrices)) if block.matrices else []
        with FlopCounterMode(display=False) as counter:
            output = stop.run(0)
        found[kind_of_block(block)] = Shapes(
            elements=sum(parameter.numel() for parameter in block.module.parameters()),
            prunable=_prunable(block.matrices),
            groups=[[[matrix.shape for matrix in group] for group in side] for side in groups],
            call=_distinct_bytes(floats(stop.call(0))),
            graph=_graph_bytes(stop, block),
            flops=counter.get_total_flops(),
        )
        return {0: output}

    short_walk(model, model.walk([sample]), visit)
    return found


def _prunable(matrices: Iterable[Matrix]) -> int:
    return sum(rows * columns for rows, columns in (matrix.shape for matrix in matrices))


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def _graph_bytes(stop: Stop, block: Block) -> int:
    """What autograd keeps of the block's forward, beside its weights."""
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.module.parameters()}

    def pack(x: Tensor) -> Tensor:
        alive.append(x)
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with differentiated([matrix.tensor for matrix in block.matrices]):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = stop.run(0, record=True)
        del output
    return sum(size for address, size in saved.items() if address not in weights)


def largest(model: Model, found: dict[Kind, Shapes]) -> tuple[int, int]:
    """(what most crosses, what all blocks' graphs keep) of one sample."""
    counts = count_kinds(model)
    return max(part.call for part in found.values()), sum(counts[kind] * part.graph for kind, part in found.items())
