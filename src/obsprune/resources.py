"""The memory and the disk a plan needs, by arithmetic, beside what there is; docs/scaling.md has the formulas."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from obsprune.engine.footprint import LEARNER, Shapes, largest, shapes
from obsprune.engine.place import InHost, OnDevice, choose_place
from obsprune.engine.rundir import bytes_in
from obsprune.engine.short_walk import Kind, count_kinds
from obsprune.errors import InputError
from obsprune.evaluate import perplexity
from obsprune.evaluate.imagenet import BATCH
from obsprune.evaluate.task import Task
from obsprune.models.activations import COPIES, free_bytes
from obsprune.models.load import Model
from obsprune.models.samples import Samples
from obsprune.plan import Plan, bytes_needed
from obsprune.ranks import ALONE, Ranks
from obsprune.report.memory import anonymous_bytes

CPU = torch.device("cpu")
WORK = 2**42
"""Flops of a block's forward in one batch: some 10 ms of a GPU, beside which the host's part of it does not count."""


@dataclass(frozen=True)
class Bytes:
    """What a stage holds at its peak. device: where the blocks are computed; host: elsewhere in host memory; disk:
    scratch files.
    """

    device: int
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Needs:
    """What a run takes at most. before: what the process holds already, on the host and on the device; stages: what
    each holds beside that; written: bytes of the result and of what leads to it; on_host: the device is the host.
    """

    before: Bytes
    stages: dict[str, Bytes]
    written: int
    on_host: bool

    @property
    def host(self) -> int:
        return self.before.host + max(part.host + (part.device if self.on_host else 0) for part in self.stages.values())

    @property
    def device(self) -> int:
        return self.before.device + max(part.device for part in self.stages.values())

    @property
    def disk(self) -> int:
        return self.written + max(part.disk for part in self.stages.values())

    def tree(self) -> dict[str, Any]:
        """As plain values; device_bytes only where the device is not the host itself."""
        device = {} if self.on_host else {"device_bytes": self.device}
        stages = {name: part.device + part.host for name, part in self.stages.items()}
        return {"host_bytes": self.host, **device, "disk_bytes": self.disk, "stages": stages}


def own(samples: Samples, ranks: Ranks) -> Samples:
    """The samples that one process works on."""
    return samples.take(ranks.mine(len(samples))) if len(samples) else samples


def own_share(plan: Plan) -> Plan:
    """The plan of one process for its samples, as if it were alone."""
    ranks, draw = plan.model.ranks, plan.draw
    mine = replace(draw, calibration=own(draw.calibration, ranks), heldout=own(draw.heldout, ranks))
    return replace(plan, draw=mine, model=replace(plan.model, ranks=ALONE))


def sampled(task: Task) -> Samples | None:
    """What a task is measured on; None where another library runs the model."""
    return getattr(task, "samples", None)


def rows_at_once(samples: Samples, model: Model) -> int:
    """Samples of one forward of an evaluation."""
    return perplexity.rows_at_once(samples, model) if model.kind.positional else BATCH


def waits(plan: Plan, waiting: int) -> str:
    """Where so many bytes of activations live: `device`, `host` or `disk`, as models/activations.py chooses."""
    asked = plan.recipe.engine.activations
    if asked != "auto":
        return asked
    if 2 * waiting <= free_bytes(plan.model.device):
        return "device"
    return "host" if 2 * waiting <= free_bytes(CPU) and plan.model.device != CPU else "disk"


def leaves_open(plan: Plan) -> bool:
    """Whether the batch size is to be found: on a CPU no size is faster than another."""
    return plan.recipe.engine.batch_size == "auto" and plan.model.device.type == "cuda"


def fitted(plan: Plan, known: int | str | None = None) -> Plan:
    """The plan with a batch size where its recipe leaves it open: the one that an unfinished run goes on with, or what
    suits every process.
    """
    if not leaves_open(plan):
        return plan
    recipe, ranks = plan.recipe, plan.model.ranks
    size = known if isinstance(known, int) else min(ranks.gather(ranks.agree(lambda: batch_size(own_share(plan)))))
    return replace(plan, recipe=replace(recipe, engine=replace(recipe.engine, batch_size=size)))


def batch_size(plan: Plan) -> int:
    """Samples of one forward of one process: twice as many as usual, and again, while a block's forward has less than
    WORK to do; half as many while they take more than a quarter of the free memory. Matching makes a step a batch, so
    there they are not more than usual.
    """
    found = shapes(plan.model, plan.model.batches(plan.draw.calibration.take([0]), 1)[0]).values()
    flops, graph = max(part.flops for part in found), max(part.graph for part in found)
    size, most = plan.draw.calibration.together, len(plan.draw.calibration)
    while not plan.recipe.matching.passes and 2 * size <= most and 2 * size * flops <= WORK:
        size *= 2
    while size > 1 and 4 * size * graph > free_bytes(plan.model.device):
        size //= 2
    return size


def reckon(plan: Plan, tasks: Iterable[Task]) -> Needs:
    """The memory and disk that a plan needs in one process; looks at one sample in one block of each kind."""
    ranks, plan = plan.model.ranks, own_share(plan)
    work = Reckoning(plan, shapes(plan.model, plan.model.batches(plan.draw.calibration.take([0]), 1)[0]))
    evaluation = [work.evaluation(own(samples, ranks)) for samples in map(sampled, tasks) if samples is not None]
    stages = {"pruning": work.one_shot()}
    if evaluation:
        stages["evaluation"] = max(evaluation, key=lambda part: part.device)
    if plan.recipe.rules or plan.recipe.iters > 1:
        stages["rounds"] = work.rounds()
    on_host = plan.model.device.type == "cpu"
    before = Bytes(0 if on_host else torch.cuda.memory_allocated(plan.model.device), anonymous_bytes())
    return Needs(before, stages, bytes_needed(plan), on_host)


@dataclass(frozen=True)
class Reckoning:
    """The arithmetic of one plan. found: its blocks' shapes."""

    plan: Plan
    found: dict[Kind, Shapes]

    @property
    def crossing(self) -> int:
        """Bytes of one sample that wait before a block, at most."""
        return max(part.call for part in self.found.values())

    def one_shot(self) -> Bytes:
        """The waiting batches, and the worst block with what is done to it."""
        draw, two = self.plan.draw, self.plan.has_two_streams
        samples = 2 * (len(draw.calibration) + len(draw.heldout)) if two else len(draw.calibration)
        waiting, block = int(COPIES * self.crossing * samples), max(map(self._block, self.found.values()))
        return self._with_activations(waiting, self.crossing * self.plan.stream_size, block)

    def _with_activations(self, waiting: int, batch: int, work: int) -> Bytes:
        """Activations wait on the device, in host memory (from which the next batch's come ahead), on disk."""
        apart = {"host": Bytes(work + batch, host=waiting), "disk": Bytes(work, disk=waiting)}
        return apart.get(waits(self.plan, waiting), Bytes(work + waiting))

    def _block(self, part: Shapes) -> int:
        """Its weights, once more where the dense model walks beside; what is measured and solved together, or what
        matching holds; one batch on its way.
        """
        recipe, free, two = self.plan.recipe, free_bytes(self.plan.model.device), self.plan.has_two_streams
        weights = self.plan.model.dtype.itemsize * (part.elements + (part.prunable if two else 0))
        sums = part.two_streams(free) if two else part.one_stream(recipe.engine.true_sequential, free)
        batch = self.plan.stream_size * part.graph
        matched = int(4 * LEARNER * part.prunable) + batch if recipe.matching.passes else 0
        return weights + max(sums + batch, sums + part.solving(self.plan.solver), matched)

    def rounds(self) -> Bytes:
        """The teacher's states, and the larger of two: all graphs with a step's gradients, or what waits for its way
        back with a block that is solved; and the stores, wherever they are.
        """
        plan, model = self.plan, self.plan.model
        free, samples = free_bytes(model.device), len(plan.draw.calibration) + len(plan.draw.heldout)
        place, stores = self._place(), self._prunable * plan.bytes_a_weight
        stays = place == "device"
        tuned = 4 * self._prunable + self._graphs() if stays and plan.recipe.make_tuning() else 0
        tape = min(2 * self.crossing * len(plan.model.blocks) * len(plan.draw.calibration), free // 4)
        solved = max(p.one_stream(False, 4 * free) + p.solving(plan.solver) for p in self.found.values())
        blocks = sum(self._elements()) if stays else max(p.elements for p in self.found.values())
        work = self.crossing * samples + model.dtype.itemsize * blocks + max(tuned, tape + solved)
        return {"device": Bytes(work + stores), "host": Bytes(work, host=stores), "disk": Bytes(work, disk=stores)}[
            place
        ]

    def _graphs(self) -> int:
        """Of all blocks and both models' logits, where they are kept at once (Place.holds)."""
        plan = self.plan
        logits = 24 * plan.draw.calibration.positions * plan.model.classes
        needed = plan.lesson_size * (logits + largest(plan.model, self.found)[1])
        return needed if 2 * needed <= free_bytes(plan.model.device) else 0

    def _elements(self) -> Iterable[int]:
        return (count * self.found[kind].elements for kind, count in count_kinds(self.plan.model).items())

    @property
    def _prunable(self) -> int:
        return sum(rows * columns for rows, columns in (matrix.shape for matrix in self.plan.model.matrices))

    def _place(self) -> str:
        """Where the stores of a round live."""
        place = choose_place(self.plan.model, self.plan.recipe.rounds.memory, self.plan.bytes_a_weight, Path())
        return "device" if isinstance(place, OnDevice) else "host" if isinstance(place, InHost) else "disk"

    def evaluation(self, samples: Samples) -> Bytes:
        """All rows wait together; one batch of them has logits."""
        model, share = self.plan.model, samples.positions / self.plan.draw.calibration.positions
        size = min(len(samples), rows_at_once(samples, model))
        logits = samples.positions * model.classes * (size * model.dtype.itemsize + 8)
        block = max(part.elements for part in self.found.values()) * model.dtype.itemsize
        graph = int(size * share * max(part.graph for part in self.found.values()))
        sample = self.crossing * share
        waiting, batch = int(COPIES * sample * len(samples)), int(sample * size)
        return self._with_activations(waiting, batch, block + max(logits, graph))


@dataclass(frozen=True)
class Free:
    """Bytes that a run can have: what there is, and what the process holds already; disk: where the result will be."""

    host: int
    device: int
    disk: int
    where: Path

    def tree(self) -> dict[str, int]:
        """As plain values."""
        return {"host_bytes": self.host, "device_bytes": self.device, "disk_bytes": self.disk}


def free_at(plan: Plan, output: Path) -> Free:
    """What there is now, for a result in `output`."""
    device, where = plan.model.device, existing(output)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else anonymous_bytes()
    host = anonymous_bytes() + free_bytes(torch.device("cpu"))
    return Free(host, held + free_bytes(device), shutil.disk_usage(where).free + bytes_in(output), where)


def existing(path: Path) -> Path:
    """The nearest directory above a path, or itself, that is there."""
    return next(parent for parent in [path, *path.resolve().parents] if parent.exists())


def require(needs: Needs, free: Free, plan: Plan) -> None:
    """Raises InputError, with what is needed, what there is and the way out, when memory or disk do not suffice."""
    worst = max(needs.stages, key=lambda name: needs.stages[name].device + needs.stages[name].host)
    out = "; take a smaller --batch-size, fewer --nsamples or --activations disk"
    out += ", or --set rounds.memory=disk" if worst == "rounds" else ""
    if not needs.on_host:
        _suffices(needs.device, free.device, f"{worst} needs about", "device memory", out)
    _suffices(needs.host, free.host, f"{worst} needs about", "host memory", out)
    _suffices(needs.disk, free.disk, "the run needs", f"disk at {free.where}", "; make room or choose another -o")


def _suffices(needed: int, free: int, who: str, what: str, out: str) -> None:
    if needed > free:
        raise InputError(f"{who} {needed / 1e9:.3g} GB of {what}, and {free / 1e9:.3g} GB can be had{out}")
