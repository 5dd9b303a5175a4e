"""The steps of I-OBS: from weights and a lesson to sparse candidates, one for each step size.

Legend: W_RC weight, g_RC its gradient, U_CC the inverse factor of the damped Gram A + λI, η step size.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from obsprune.core.iobs import natural_direction
from obsprune.core.linalg import factorise
from obsprune.core.statistics import Gram
from obsprune.engine.dealing import Deal
from obsprune.engine.gradients import Sums, gradients_and_grams
from obsprune.engine.inputs import require_finite
from obsprune.engine.layerwise import Projection, Pruned, outcome, project_blocks
from obsprune.engine.place import Dense, Source, Store, Tensors
from obsprune.engine.teacher import Lesson
from obsprune.models.activations import free_bytes
from obsprune.models.blocks import Block
from obsprune.models.matrices import Matrix
from obsprune.progress import Progress
from obsprune.ranks import Ranks
from obsprune.solvers.base import AnySolver, Solution

SIZES = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
"""Step sizes of the first search; afterwards the last winner and its neighbours at a factor NEAR."""
NEAR = 1.8


@dataclass(frozen=True)
class Candidate:
    """Weights that obey the patterns, the step size that led to them, and what became of each matrix, by block.

    The weights are in the compute dtype: what is judged is what will be saved.
    """

    size: float
    weights: Store
    matrices: dict[str, list[Pruned]]


class Step(ABC):
    """From a point to candidates for the next iterate, one for each step size."""

    @abstractmethod
    def sizes(self, last: float | None) -> Sequence[float]:
        """The step sizes to try after a round that `last` won."""

    @abstractmethod
    def candidates(
        self, weights: Source, lesson: Lesson, projection: Projection, sizes: Sequence[float], progress: Progress
    ) -> list[Candidate]:
        """Projected points; the store of each lives until the next round."""


@final
@dataclass(frozen=True)
class Newton(Step):
    """W⁺ = W − η g (A + λI)⁻¹ with g = ∂KL/∂W and A the Gram at the sparse model; λ = damping · mean diagonal.

    η = 0 is always among the candidates: the point itself, projected. It is the only one when `moves` is False.
    """

    damping: float = 0.01
    moves: bool = True

    def sizes(self, last: float | None) -> Sequence[float]:
        return [0.0, *([last / NEAR, last, last * NEAR] if last else SIZES)] if self.moves else [0.0]

    def candidates(
        self, weights: Source, lesson: Lesson, projection: Projection, sizes: Sequence[float], progress: Progress
    ) -> list[Candidate]:
        place = lesson.place
        found = [Candidate(size, place.store(f"candidate-{number}"), {}) for number, size in enumerate(sizes)]

        def solve(block: Block, sums: Sums) -> None:
            self._solve_block(block, sums, weights.get(block), projection, found, place.model.ranks)
            progress.step()

        progress.stage("gradients and projections", len(place.model.blocks))
        gradients_and_grams(lesson, chunk_size(lesson), weights, solve)
        return found

    def _solve_block(
        self, block: Block, sums: Sums, weights: Tensors, projection: Projection, found: list[Candidate], ranks: Ranks
    ) -> None:
        assert sums.inputs is not None
        inputs, deal = sums.inputs, Deal.of(block.matrices, ranks)
        sums.add_up(ranks)
        inputs.add_up(deal)
        carried = {name: weights[name].to(tensor.dtype) for name, tensor in block.carried.items()}
        answers = [{name: tensor.clone() for name, tensor in carried.items()} for _ in found]
        sizes, dense = [candidate.size for candidate in found], Dense().get(block)
        results: dict[str, list[Pruned]] = {}

        def solve() -> None:
            for gram, group in inputs.shared():
                for matrix, solver, state, direction_RC in self._directions(gram, deal.own(group), sums, projection):
                    pattern, W_RC = projection.patterns[matrix.name], weights[matrix.name].to(direction_RC)
                    for size, answer in zip(sizes, answers, strict=True):
                        start, point_RC = time.perf_counter(), W_RC - size * direction_RC
                        solution = solver.solve(point_RC, state, pattern)
                        result = _accept(matrix, solution, gram, dense, answer, time.perf_counter() - start)
                        results.setdefault(matrix.name, []).append(result)

        ranks.agree(solve)
        all_results = {name: pruned for part in ranks.gather(results) for name, pruned in part.items()}
        for number, (candidate, answer) in enumerate(zip(found, answers, strict=True)):
            for matrix in block.matrices:
                _give(answer, matrix, ranks, deal.owner[matrix.name])
            groups = [group for _, group in inputs.shared()]
            candidate.matrices[block.name] = [all_results[matrix.name][number] for group in groups for matrix in group]
            candidate.weights.put(block, answer)

    def _directions(
        self, gram: Gram, own: list[Matrix], sums: Sums, projection: Projection
    ) -> Iterator[tuple[Matrix, AnySolver, Any, Tensor]]:
        """g (A + λI)⁻¹ for those of a Gram's matrices that this process solves, and what projects them."""
        if not own:
            return
        require_finite(gram)
        U_CC = factorise(gram, self.damping).U_CC
        for solver, matrices in projection.dealt(own, gram):
            state = solver.prepare(gram)
            for matrix in matrices:
                yield matrix, solver, state, natural_direction(sums.gradients[matrix.name].to(U_CC), U_CC)


def _give(answer: Tensors, matrix: Matrix, ranks: Ranks, source: int) -> None:
    """What one process has found for a matrix, to all."""
    ranks.give(answer.setdefault(matrix.name, matrix.weight.new_empty(matrix.shape)), source)
    if matrix.bias is not None:
        ranks.give(answer[matrix.bias_parameter][matrix.rows], source)


def _accept(matrix: Matrix, solution: Solution, gram: Gram, dense: Tensors, answer: Tensors, seconds: float) -> Pruned:
    """Puts a solution into a candidate's tensors; what it is worth beside the dense ones."""
    answer[matrix.name] = solution.weight.to(matrix.weight.dtype)
    if solution.bias_shift is not None:
        name, rows = matrix.bias_parameter, matrix.rows
        answer[name][rows] += solution.bias_shift.to(answer[name].dtype)
        solution = replace(solution, bias_shift=(answer[name].to(gram.H_CC) - dense[name].to(gram.H_CC))[rows])
    return outcome(matrix, dense[matrix.name].to(gram.H_CC), solution, gram, seconds)


@final
@dataclass(frozen=True)
class Between(Source):
    """The share `size` of the way from some weights to the dense ones, biases and norms too."""

    weights: Source
    size: float

    def get(self, block: Block) -> Tensors:
        sparse = self.weights.get(block)
        return {name: torch.lerp(sparse[name].to(x), x, self.size) for name, x in Dense().get(block).items()}


@final
@dataclass(frozen=True)
class Local(Step):
    """W⁺ = W + η (W_dense − W), each block projected on what the pruned blocks before it hand on.

    Knows nothing of the whole model's loss. η = 1 on the sequences of the first round is one shot over again.
    """

    def sizes(self, last: float | None) -> Sequence[float]:
        return [0.25, 0.5, 1.0]

    def candidates(
        self, weights: Source, lesson: Lesson, projection: Projection, sizes: Sequence[float], progress: Progress
    ) -> list[Candidate]:
        progress.stage("layer-local steps", len(sizes))
        found = []
        for number, size in enumerate(sizes):
            store = lesson.place.store(f"candidate-{number}")
            matrices = project_blocks(lesson.place, lesson.batches, projection, store, Between(weights, size))
            found.append(Candidate(size, store, matrices))
            progress.step()
        return found


def chunk_size(lesson: Lesson) -> int:
    """How many batches may be under way at once: a quarter of the free memory for the blocks' inputs and outputs."""
    return max(1, free_bytes(lesson.place.model.device) // 4 // (2 * lesson.crossing))
