"""What the parts of a round take on this machine, tried with one batch in one block of each kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from obsprune.core.iobs import natural_direction
from obsprune.core.linalg import factorise
from obsprune.core.losses import agreement, divergence
from obsprune.core.optimizers import Adam
from obsprune.engine.coverage import Coverage
from obsprune.engine.gradients import Sums
from obsprune.engine.inputs import Inputs
from obsprune.engine.layerwise import Projection, outcome
from obsprune.engine.rehearsal import Forward, run_forward
from obsprune.engine.short_walk import Kind, Stopwatch, floats, kind_of_block, short_walk
from obsprune.engine.teacher import HiddenStates, Logits, Memory
from obsprune.models.backward import backward_of
from obsprune.models.blocks import Block
from obsprune.models.load import Model
from obsprune.models.matrices import differentiated
from obsprune.models.samples import Batch
from obsprune.models.walk import Stop


@dataclass(frozen=True)
class Back:
    """One block of a kind in a round. write: weights put into it; there: forward and backward with one batch; measured:
    the same with the Grams; update: an optimizer step; solve, again: all its matrices from new Grams, and once more.
    """

    write: float
    there: float
    measured: float
    update: float
    solve: float
    again: float


@dataclass(frozen=True)
class Lesson:
    """One batch with a teacher. taught: the dense model's way; scored, back: outside the blocks, for a score and for a
    gradient; blocks: the parts of a round.
    """

    taught: Forward
    scored: float
    back: float
    blocks: dict[Kind, Back]


def rehearse_scores(model: Model, batch: Batch) -> tuple[Forward, float, Memory]:
    """A batch through the dense model, the seconds outside the blocks for a score, and what the teacher said."""
    memory: Memory = HiddenStates(model.head) if model.kind.positional else Logits()

    def finish(key: int, output: Any) -> None:
        s, t = memory.pair(key, output)
        float(divergence(s, t) + model.kind.loss(s, t, batch)[0] + agreement(s, t))

    walk = model.walk([batch], memory.answered)
    with memory.learning(walk.current):
        run_forward(model, walk)
    walk = model.walk([batch], memory.answered)
    with memory.learning(walk.current):
        taught = run_forward(model, walk)
    walk = model.walk([batch], finish)
    with memory.beside(walk.current):
        scored = run_forward(model, walk).outside
    return taught, scored, memory


def rehearse_round(model: Model, batch: Batch, projection: Projection, damping: float) -> Lesson:
    """The parts of a round for one batch."""
    taught, scored, memory = rehearse_scores(model, batch)
    blocks: dict[Kind, Back] = {}
    finish = backward_of(lambda key, output: divergence(*memory.pair(key, output)))
    walk = model.walk([batch], finish, record=True)
    with memory.beside(walk.current):
        back = short_walk(model, walk, partial(_back, model, projection, damping, blocks))
    return Lesson(taught, scored, back, blocks)


def _back(
    model: Model, projection: Projection, damping: float, blocks: dict[Kind, Back], stop: Stop, block: Block
) -> dict[int, Any]:
    output = tree_map_only(Tensor, _leaf, stop.run(0))
    weights, run, watch = block.weights(), partial(_there_and_back, stop), Stopwatch(model.device)
    block.write(weights)
    watch.lap("write")
    sums, measured = Sums(), Sums({}, Inputs(block.matrices))
    with differentiated([matrix.tensor for matrix in block.matrices]):
        sums.visit(block, run)
        for name, visited in (("there", sums), ("measured", measured)):
            watch.start()
            visited.visit(block, run)
            watch.lap(name)
    if block.matrices:
        _update(sums, watch)
        _solve(block, measured, replace(projection, coverage=Coverage(fewest=1)), damping, watch)
    parts = {name: watch.seconds.get(name, 0.0) for name in ("write", "there", "measured", "update", "solve", "again")}
    blocks[kind_of_block(block)] = Back(**parts)
    return {0: output}


def _there_and_back(stop: Stop) -> None:
    """The block with a graph, and the way back to its weights and its inputs."""
    args, kwargs = tree_map_only(Tensor, _leaf, stop.call(0))
    with torch.enable_grad():
        outputs = [y for y in floats(stop.module(*args, **kwargs)) if y.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _update(sums: Sums, watch: Stopwatch) -> None:
    for gradient in sums.gradients.values():
        W, m, v = (torch.zeros_like(gradient) for _ in range(3))
        watch.start()
        keep = W != 0
        Adam().step(W, gradient * keep, m, v, 1e-5, 1)
        W.mul_(keep)
        watch.lap("update")


def _solve(block: Block, sums: Sums, projection: Projection, damping: float, watch: Stopwatch) -> None:
    """As a Newton step does, for two candidates."""
    assert sums.inputs is not None
    for gram, group in sums.inputs.shared():
        watch.start()
        U_CC = factorise(gram, damping).U_CC
        for solver, matrices in projection.dealt(group, gram):
            state = solver.prepare(gram)
            for matrix in matrices:
                W_RC = matrix.read().to(gram.H_CC)
                point_RC = W_RC - 1e-3 * natural_direction(sums.gradients[matrix.name].to(U_CC), U_CC)
                for part in ("solve", "again"):
                    solution = solver.solve(point_RC, state, projection.patterns[matrix.name])
                    outcome(matrix, W_RC, solution, gram, 0.0)
                    watch.lap(part)
