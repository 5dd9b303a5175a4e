"""What the parts of a run take on this machine, tried on one block of each kind and a few batches. The blocks, batches,
streams, solver and matching are the run's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from obsprune.engine.coverage import Coverage
from obsprune.engine.layerwise import After, Projection, solve
from obsprune.engine.norms import Renorm
from obsprune.engine.short_walk import Kind, Line, Stopwatch, kind_of_block, short_walk
from obsprune.engine.streams import Streams
from obsprune.models.blocks import Block
from obsprune.models.load import Model
from obsprune.models.samples import Batch
from obsprune.models.walk import Stop, Walk
from obsprune.progress import Progress

FEW, MANY = 4, 16
"""Batches of the longer rehearsals; the second of them where the first is over too soon to tell."""
ENOUGH = 0.25
"""Seconds that should not be too soon."""


@dataclass(frozen=True)
class Shot:
    """One block of a kind, pruned. load: its weights read, and gathered again to be written; run: one batch through it;
    measuring, matching: by batches that walk, the latter for one pass; solving: its matrices.
    """

    load: float
    run: float
    measuring: Line
    solving: float
    matching: Line


@dataclass(frozen=True)
class Tried:
    """One rehearsal. walking: batches of all streams; seconds: of the parts, by kind of block; between: of one batch
    between all blocks.
    """

    walking: int
    seconds: dict[Kind, dict[str, float]]
    between: float

    @property
    def growing(self) -> float:
        """Seconds of the parts that grow with the batches."""
        return sum(seconds.get(part, 0.0) for seconds in self.seconds.values() for part in ("measuring", "matching"))

    def shot(self, kind: Kind, shorter: Tried) -> Shot:
        """What a block of this kind takes, as this rehearsal and a shorter one show."""
        found, less = self.seconds[kind], shorter.seconds[kind]

        def line(part: str) -> Line:
            return Line.through((shorter.walking, less.get(part, 0.0)), (self.walking, found.get(part, 0.0)))

        return Shot(found["load"], found["run"], line("measuring"), found.get("solving", 0.0), line("matching"))


@dataclass(frozen=True)
class Scene:
    """What is rehearsed. streams: of one process, of so many batches to calibrate on; most: how many there are."""

    model: Model
    streams: Callable[[int], Streams]
    most: int
    projection: Projection
    after: After

    def tried(self, batches: int, solves: bool) -> Tried:
        """Carries out one shot on so many batches, with or without the solver."""
        streams = self.streams(batches)
        found: dict[Kind, dict[str, float]] = {}
        between = short_walk(self.model, self.model.walk(streams.batches), partial(self._visit, streams, solves, found))
        return Tried(len(streams.batches), found, between / len(streams.batches))

    def _visit(
        self, streams: Streams, solves: bool, found: dict[Kind, dict[str, float]], stop: Stop, block: Block
    ) -> dict[int, Any]:
        watch, keys = Stopwatch(self.model.device), stop.keys
        outputs = {key: stop.run(key) for key in keys}
        watch.lap("run")
        projection = replace(self.projection, coverage=Coverage(fewest=1))  # few tokens reach few experts
        projection.coverage.measure(stop, streams.calibrating, block, streams.ranks)
        norms = Renorm.of(stop, streams.calibrating, streams.ranks) if self.after.reestimate else None
        for stage in streams.stages(stop, block.matrices) if block.matrices else ():
            watch.lap("measuring")
            if solves:
                solve(stage, projection, lambda _: None)
            watch.lap("solving")
        if norms and block.matrices:
            norms.apply(stop)
        watch.lap("measuring")
        if self.after.matching and block.matrices:
            replace(self.after.matching, passes=1)(stop, block, streams.goals, streams.ranks, lambda _: None)
        watch.lap("matching")
        block.tensors()
        with block.loaded(self.model.device):
            watch.lap("load")
        watch.seconds["run"] /= len(keys)
        found[kind_of_block(block)] = watch.seconds
        return outputs


def rehearse_shot(scene: Scene, progress: Progress) -> tuple[dict[Kind, Shot], float]:
    """What one block of each kind takes, and one batch between all blocks. The first try only warms up; the other
    two tell the batches from what is fixed.
    """
    progress.stage("trying one block of each kind", 3)
    scene.tried(1, solves=False)
    progress.step()
    few = scene.tried(1, solves=False)
    progress.step()
    many = scene.tried(min(FEW, scene.most), solves=True)
    if many.growing < ENOUGH and scene.most > FEW:
        many = scene.tried(min(MANY, scene.most), solves=True)
    progress.step()
    return {kind: many.shot(kind, few) for kind in many.seconds}, many.between


@dataclass(frozen=True)
class Forward:
    """One batch: seconds of each kind of block, and outside all blocks."""

    blocks: dict[Kind, float]
    outside: float


def rehearse_forward(model: Model, batch: Batch, finish: Callable[[int, Any], None]) -> Forward:
    """One batch all the way, `finish` called with the output: once to warm up, once for the clock."""
    return [run_forward(model, model.walk([batch], finish)) for _ in range(2)][-1]


def run_forward(model: Model, walk: Walk) -> Forward:
    """One walk with a single batch."""
    blocks: dict[Kind, float] = {}

    def visit(stop: Stop, block: Block) -> dict[int, Any]:
        watch = Stopwatch(model.device)
        output = stop.run(0)
        watch.lap("run")
        blocks[kind_of_block(block)] = watch.seconds["run"]
        return {0: output}

    return Forward(blocks, short_walk(model, walk, visit))
