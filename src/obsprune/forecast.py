"""How long a plan will take: what one block of each kind and a few batches took, times how often a run does it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from obsprune.core.allocation import levels_around
from obsprune.engine.dealing import Deal
from obsprune.engine.finetune import Tuning
from obsprune.engine.layerwise import After
from obsprune.engine.place import OnDevice, choose_place
from obsprune.engine.rehearsal import Forward, Scene, Shot, rehearse_forward, rehearse_shot
from obsprune.engine.round_rehearsal import Lesson, rehearse_round, rehearse_scores
from obsprune.engine.rounds import PROBE
from obsprune.engine.short_walk import Kind, count_kinds
from obsprune.errors import InputError
from obsprune.evaluate.perplexity import next_token_losses
from obsprune.evaluate.task import Task
from obsprune.models.planes import bytes_of, make_compressor, pack, unpack
from obsprune.models.samples import Samples
from obsprune.plan import Plan, make_streams
from obsprune.progress import Progress
from obsprune.resources import existing, own, own_share, rows_at_once, sampled

RATES_TRIED = 3
"""Of the learning rates of a first round: the search begins in the middle and ends when the divergence rises."""
PROBE_BYTES = 2**26
"""Written to see how fast the disk is."""


@dataclass(frozen=True)
class Forecast:
    """Seconds by stage, and the tasks whose time is not known."""

    seconds: dict[str, float]
    unknown: list[str]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def tree(self) -> dict[str, Any]:
        """As plain values."""
        return {**self.seconds, "total": self.total, "unknown": self.unknown}


def forecast(plan: Plan, tasks: Iterable[Task], output: Path, progress: Progress) -> Forecast:
    """Tries one block of each kind, and says how long everything will take. Writes nothing that stays."""
    ranks = plan.model.ranks
    known = {task.name: own(samples, ranks) for task in tasks if (samples := sampled(task)) is not None}
    unknown = [task.name for task in tasks if task.name not in known]
    dealt, plan = _dealt(plan), own_share(plan)
    plan = replace(plan, model=plan.model.keeping(plan.recipe.engine.activations, existing(output)))
    recipe = plan.recipe
    after = After(recipe.make_matching(), recipe.engine.reestimate_norms)
    batches = -(-len(plan.draw.calibration) // plan.stream_size)
    scene = Scene(plan.model, lambda count: make_streams(plan, count), batches, plan.projection, after)
    shots, between = rehearse_shot(scene, progress)
    clock = _Clock(plan, shots, between, _disk_speed(output, plan.model.checkpoint.bytes), dealt)
    seconds = {"preparation": clock.preparation(), "pruning": clock.one_shot()}
    if recipe.rules:
        seconds["allocation"] = clock.allocation()
    evaluation = sum(map(clock.evaluation, known.values()))
    if recipe.iters > 1:
        seconds["rounds"] = clock.rounds() + clock.iterates(evaluation / 2)
    seconds["evaluation"] = evaluation
    seconds["writing"] = clock.writing()
    if recipe.format == "packed":
        seconds["packing"] = clock.packing()
    return Forecast(seconds, unknown)


def _dealt(plan: Plan) -> float:
    """The share of a block's solves that falls to the process with most of them."""
    block = next(block for block in plan.model.blocks if block.matrices)
    deal, cost = Deal.of(block.matrices, plan.model.ranks), dict[int, float]()
    for matrix in block.matrices:
        rows, columns = matrix.shape
        cost[deal.owner[matrix.name]] = cost.get(deal.owner[matrix.name], 0.0) + columns**2 * (columns + rows)
    return max(cost.values()) / sum(cost.values())


def _disk_speed(output: Path, most: int) -> float:
    """Seconds a byte takes to be written and be safe; `most` bytes are tried. Raises InputError."""
    size, where = min(PROBE_BYTES, most), existing(output)
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            start = time.perf_counter()
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - start) / size
    except OSError as error:
        raise InputError(f"cannot write in {where}: {error.strerror}; choose another -o") from error


@dataclass(frozen=True)
class _Clock:
    """Counts how often a run does what was rehearsed. between: seconds of one batch between all blocks; disk: seconds
    a byte takes; dealt: the share of the solves that one process has.
    """

    plan: Plan
    shots: dict[Kind, Shot]
    between: float
    disk: float
    dealt: float

    @cached_property
    def counts(self) -> dict[Kind, int]:
        return count_kinds(self.plan.model)

    def _all(self, of: Callable[[Kind], float]) -> float:
        """Of all blocks."""
        return sum(count * of(kind) for kind, count in self.counts.items())

    @cached_property
    def load(self) -> float:
        """Reading all blocks once."""
        return self._all(lambda kind: self.shots[kind].load) / 2  # a shot reads them twice: to load and to write

    def preparation(self) -> float:
        """Opening, drawing, the checks; opening the result again to evaluate it."""
        reads = 2 if self.plan.recipe.iters == 1 else 4
        return 2 * self.plan.opening + self.plan.drawing + reads * self.load

    def one_shot(self) -> float:
        """Every block measured, solved, matched, and run once more on the pruned stream's batches."""
        plan, streams = self.plan, 2 if self.plan.has_two_streams else 1
        sparse = self._batches(len(plan.draw.calibration), plan.stream_size)
        sparse += self._batches(len(plan.draw.heldout), plan.stream_size) if streams == 2 else 0
        walking, passes = streams * sparse, plan.recipe.matching.passes
        each = self._all(lambda kind: self._block(self.shots[kind], walking, sparse, passes))
        return each + walking * self.between

    def _block(self, shot: Shot, walking: float, sparse: float, passes: int) -> float:
        """walking: batches of all streams; sparse: those that see the pruned block."""
        tuned = shot.measuring.at(walking) + passes * shot.matching.at(walking)
        return shot.load + tuned + self.dealt * shot.solving + sparse * shot.run

    def _batches(self, samples: int, size: int) -> float:
        """How many whole ones they are worth."""
        return max(1.0, samples / size) if samples else 0.0

    def evaluation(self, samples: Samples) -> float:
        """One task, of the dense model and of the pruned one."""
        model = self.plan.model
        size = min(len(samples), rows_at_once(samples, model))
        start = time.perf_counter()
        batch = model.batches(samples.take(range(size)), size)[0]
        made = time.perf_counter() - start

        def finish(key: int, output: Any) -> None:
            if model.kind.positional:
                next_token_losses(output.logits, batch["input_ids"])

        one = rehearse_forward(model, batch, finish)
        batches = self._batches(len(samples), size)
        return 2 * (batches * (made + self._forward(one)) + self.load)

    def _forward(self, one: Forward) -> float:
        """One batch all the way."""
        return self._all(lambda kind: one.blocks[kind]) + one.outside

    @cached_property
    def judge(self) -> tuple[float, float]:
        """Seconds of the dense model's answers on what is held out, and of one score beside them."""
        plan, size = self.plan, min(self.plan.judged_at_once, len(self.plan.draw.heldout))
        taught, scored, _ = rehearse_scores(
            plan.model, plan.model.batches(plan.draw.heldout.take(range(size)), size)[0]
        )
        batches, blocks = self._batches(len(plan.draw.heldout), size), self._all(lambda kind: taught.blocks[kind])
        return batches * self._forward(taught) + self.load, batches * (blocks + scored) + self._visits

    @cached_property
    def lesson(self) -> Lesson:
        plan, size = self.plan, min(self.plan.lesson_size, len(self.plan.draw.calibration))
        batch = plan.model.batches(plan.draw.calibration.take(range(size)), size)[0]
        return rehearse_round(plan.model, batch, plan.projection, plan.recipe.rounds.damping)

    @cached_property
    def _resident(self) -> bool:
        plan = self.plan
        place = choose_place(plan.model, plan.recipe.rounds.memory, plan.bytes_a_weight, Path())
        return isinstance(place, OnDevice)

    @cached_property
    def _visits(self) -> float:
        """Every block given an iterate's weights, once."""
        write = self._all(lambda kind: self.lesson.blocks[kind].write)
        return write if self._resident else write + 2 * self.load

    def rounds(self) -> float:
        """The first one's score, and all others; the best one committed."""
        recipe = self.plan.recipe
        tuning, step = recipe.make_tuning(), recipe.make_step()
        teach, score = self.judge
        spent = teach + score + self._visits + 2 * self.load + self._written(1)
        for number in range(1, recipe.iters):
            sizes = len(step.sizes(None if number == 1 else 1.0))
            spent += self._teach() + (self._tuned(tuning, number == 1) if tuning else 0.0)
            spent += self._candidates(sizes) + sizes * score + self._written(1)
        return spent

    def iterates(self, evaluation: float) -> float:
        """Every round's one written, opened and evaluated, where that is asked."""
        recipe = self.plan.recipe
        return recipe.rounds.scored * recipe.iters * (evaluation + self.writing() + self._visits)

    @property
    def _lessons(self) -> float:
        return self._batches(len(self.plan.draw.calibration), self.plan.lesson_size)

    def _teach(self) -> float:
        return self._lessons * self._forward(self.lesson.taught) + self.load

    def _tuned(self, tuning: Tuning, first: bool) -> float:
        """All passes, and before the first ones the search for a learning rate."""
        steps = min(tuning.steps, int(self._lessons)) * tuning.passes
        tried = max(1, int(PROBE * steps) // tuning.passes) * RATES_TRIED if first else 0
        judged = self.judge[1] + (0.0 if tuning.masked else self._candidates(1))
        updates = (steps + tried) * self._update(self._lessons * tuning.passes / steps)
        return updates + (1 + first * RATES_TRIED) * judged

    def _update(self, batches: float) -> float:
        """One optimizer step on so many batches."""
        parts = self.lesson.blocks
        there = self._all(lambda kind: parts[kind].there) + self.lesson.back
        again = 0.0 if self._resident else self._all(lambda kind: self.lesson.taught.blocks[kind])
        return batches * (there + again) + self._visits + self._all(lambda kind: parts[kind].update)

    def _candidates(self, sizes: int) -> float:
        """Gradients and Grams of the whole lesson; every matrix solved for each step size."""
        parts = self.lesson.blocks
        measured = self._all(lambda kind: parts[kind].measured + self.lesson.taught.blocks[kind]) + self.lesson.back
        solved = self._all(lambda kind: self.dealt * (parts[kind].solve + (sizes - 1) * parts[kind].again))
        return self._lessons * measured + 2 * self._visits + self.load + solved

    def allocation(self) -> float:
        """A trial for each rule beside the one for uniform shares, which counts as the pruning; what rules look at."""
        rules = self.plan.recipe.rules
        teach, score = self.judge
        looked = sum(self._look(rule) for rule in rules)
        return teach + looked + len(rules) * self.one_shot() + (1 + len(rules)) * (score + self.load)

    def _look(self, rule: str) -> float:
        """The probes of a rule: the dense model's Grams, solved for some levels, and what is pruned alone judged."""
        plan, score = self.plan, self.judge[1]
        assert plan.recipe.sparsity is not None
        levels, judged = {
            "owl": (0, 0),
            "importance": (1, len(plan.model.blocks)),
            "knapsack": (len(levels_around(plan.recipe.sparsity)), len(plan.model.matrices)),
        }[rule]
        batches = self._batches(len(plan.draw.calibration), plan.batch_size)
        measured = self._all(lambda kind: self.shots[kind].measuring.at(batches) + batches * self.shots[kind].run)
        return measured + self.load + levels * self._all(lambda kind: self.shots[kind].solving) + judged * score

    def writing(self) -> float:
        """The result, from weights that are read again."""
        return self._written(1) + self.load

    def packing(self) -> float:
        """The result packed and read back, as fast as a block with matrices is."""
        block = next(block for block in self.plan.model.blocks if block.matrices)
        tensors = block.checkpoint.read(block.keys)
        start, compressor = time.perf_counter(), make_compressor()
        for x in tensors.values():
            packed = b"".join(pack(bytes_of(x), x.itemsize, 0, compressor))
            unpack(np.frombuffer(packed, np.uint8), x.itemsize, x.numel(), 0)
        spent, size = time.perf_counter() - start, sum(x.nbytes for x in tensors.values())
        return spent / size * self.plan.model.checkpoint.bytes + self._written(1)

    def _written(self, times: int) -> float:
        return times * self.plan.model.checkpoint.bytes * self.disk
