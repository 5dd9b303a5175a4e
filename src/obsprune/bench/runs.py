"""The story of bench: a checkpoint of a named shape is made of random weights, pruned by several methods as anybody
would prune it, and every phase held against what the machine could do.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, final

import torch
from torch import Tensor

from obsprune import __version__, pipeline, presets
from obsprune.bench.ceilings import Sizes, measure
from obsprune.bench.phases import Phase, Recorder
from obsprune.bench.probes import watched
from obsprune.bench.scratch import scratch
from obsprune.engine.inputs import distinct_inputs
from obsprune.engine.short_walk import count_kinds, kind_of_block, short_walk
from obsprune.errors import InputError, nearest
from obsprune.evaluate.inference import machine, now
from obsprune.models.activations import trim_heap
from obsprune.models.blocks import Block
from obsprune.models.load import choose_device
from obsprune.models.matrices import Matrix
from obsprune.models.shapes import Shape, find_shape
from obsprune.models.walk import Stop
from obsprune.plan import Plan, make_plan, make_tasks, suited
from obsprune.progress import Progress
from obsprune.recipe import Recipe, make_recipe
from obsprune.resources import Free, Needs, free_at, reckon
from obsprune.trees import Tree

METHODS: dict[str, tuple[str | None, Tree]] = {
    "sparsegpt": (None, {"solver": {"name": "sparsegpt"}}),
    "fast": ("fast", {}),
    "balanced": ("balanced", {}),
    "iobs": (None, {"solver": {"name": "sparsegpt"}, "iters": 3}),
    "best": ("best", {}),
}
"""What can be measured, as a preset and what is laid over it; `iobs` is `--solver sparsegpt --iters 3`."""
USUAL = ("sparsegpt", "balanced", "iobs", "best")
SHAPE = {"cuda": "llama-2-7b", "cpu": "deit-tiny"}
"""What is measured where nobody names a shape, by device."""
ONCE = ("preparation", "opening", "evaluation", "teaching", "judging")
"""Phases that do not grow with the number of blocks: what they do in blocks are phases of their own."""
SPARE = 1.05
"""Of the disk: journals, configs, images."""


OWN = ("model.name", "data.dataset", "engine.device")
"""Settings that a bench makes itself, or has an option for."""


def refuse(settings: Sequence[Tree], keys: Sequence[str], way_out: str) -> None:
    """Raises InputError where one of some settings is set, such as model.name."""
    for key in keys:
        part, _, name = key.rpartition(".")
        parts = [tree.get(part) if part else tree for tree in settings]
        if any(isinstance(tree, Mapping) and name in tree for tree in parts):
            raise InputError(f"bench has its own {key}; {way_out}")


@final
@dataclass(frozen=True)
class Asked:
    """What is measured. shape: None is what suits the device; methods: none named are those of USUAL that there is room
    for; blocks: so many of its blocks, None all; settings: laid over every method's recipe; workdir: where the
    checkpoint and the results lie meanwhile; sizes: of what ceilings are measured with, None what suits the device.
    """

    shape: str | None = None
    methods: Sequence[str] = ()
    device: str = "auto"
    blocks: int | None = None
    settings: Sequence[Tree] = ()
    workdir: Path | None = None
    sizes: Sizes | None = None

    @property
    def chosen(self) -> Sequence[str]:
        return self.methods or USUAL

    def recipe(self, method: str, model: Path, dataset: str) -> Recipe:
        """Of one method on the checkpoint. Raises InputError."""
        if method not in METHODS:
            raise InputError(f"unknown method '{method}'; {nearest(method, METHODS)}")
        refuse(self.settings, OWN, "leave it out: --shape names weights, --device the device, samples are random")
        preset, tree = METHODS[method]
        fixed: Tree = {
            "model": {"name": str(model)},
            "data": {"dataset": dataset},
            "evaluation": ["heldout"],
            "engine": {"device": self.device},
        }
        return make_recipe(*presets.layered(preset, {}, fixed, tree, *self.settings))


@dataclass(frozen=True)
class Outlook:
    """What a bench comes to, before it costs anything. checkpoint: its bytes; needs: of each method; flops: of one pass
    of each part over all samples.
    """

    checkpoint: int
    needs: Mapping[str, Needs]
    free: Free
    flops: Mapping[str, float]

    def disk(self, method: str) -> int:
        """The checkpoint, and a result, which goes before the next one."""
        return int(SPARE * (self.checkpoint + self.needs[method].disk))

    def lacking(self, method: str) -> str | None:
        """Why there is no room for a method, and the way out."""
        needs, less = self.needs[method], "fewer --blocks, fewer --nsamples or a shorter --seqlen"
        rooms = [
            ("host memory", needs.host, self.free.host, less),
            ("device memory", 0 if needs.on_host else needs.device, self.free.device, less),
            ("disk", self.disk(method), self.free.disk, "fewer --blocks, another --workdir"),
        ]
        for what, needed, free, out in rooms:
            if needed > free:
                sizes = f"{needed / 1e9:.3g} GB of {what}, and {free / 1e9:.3g} GB can be had"
                return f"{method} needs {sizes}; take {out}, or name other methods"
        return None

    def possible(self, asked: Asked) -> tuple[list[str], dict[str, str]]:
        """The methods that there is room for, and {method: why not} of the others. Raises InputError when one was named
        that there is none for, or there is none at all.
        """
        lacking = {method: why for method in asked.chosen if (why := self.lacking(method))}
        if lacking and (asked.methods or len(lacking) == len(asked.chosen)):
            raise InputError(next(iter(lacking.values())))
        return [method for method in asked.chosen if method not in lacking], lacking

    def tree(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "checkpoint_bytes": self.checkpoint,
            "disk_bytes": {method: self.disk(method) for method in self.needs},
            "flops": dict(self.flops),
            "memory": {method: needs.tree() for method, needs in self.needs.items()},
            "free": self.free.tree(),
        }


@dataclass(frozen=True)
class Bench:
    """A bench in its folder. depth: the blocks that the whole shape has, None where these differ; dense: where the
    checkpoint is.
    """

    asked: Asked
    shape: Shape
    depth: int | None
    device: torch.device
    dense: Path
    dataset: str

    @classmethod
    def of(cls, asked: Asked, folder: Path) -> Bench:
        """With the samples that its methods need. Raises InputError."""
        device = choose_device(asked.device)
        whole = find_shape(asked.shape or SHAPE[device.type])
        shape, dense = whole.deep(asked.blocks), folder / "dense"
        data = [suited(asked.recipe(method, dense, ""), whole.kind) for method in asked.chosen]
        needed = max(one.iters * (one.data.nsamples or 0) + (one.data.heldout or 0) for one in data)
        dense.mkdir()
        depth = whole.values.get("num_hidden_layers")
        return cls(asked, shape, depth, device, dense, shape.samples(dense, needed))

    def recipe(self, method: str) -> Recipe:
        return self.asked.recipe(method, self.dense, self.dataset)

    def outlook(self, progress: Progress) -> Outlook:
        """Sizes by arithmetic, on an outline of the checkpoint without its weights. Raises InputError."""
        self.shape.outline(self.dense)
        needs, flops = dict[str, Needs](), dict[str, float]()
        progress.stage("what it needs", len(self.asked.chosen))
        for method in self.asked.chosen:
            plan = make_plan(self.recipe(method))
            needs[method], flops = reckon(plan, make_tasks(plan)[0]), flops or one_pass(plan)
            progress.step()
        return Outlook(plan.model.checkpoint.bytes, needs, free_at(plan, self.dense), flops)

    def run(self, method: str, rates: Mapping[str, float], progress: Progress) -> dict[str, Any]:
        """One method from the checkpoint to its result, which is deleted: what it took, phase by phase."""
        output = self.dense.parent / method
        trim_heap()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        recorder = Recorder(partial(now, self.device))
        with watched(recorder):
            report = pipeline.prune(self.recipe(method), output, progress)
        shutil.rmtree(output)
        return {
            "method": method,
            "recipe": report["recipe"],
            "seconds": recorder.total,
            "scaled_seconds": sum(self._times(phase) * phase.seconds for phase in recorder.phases.values()),
            "memory": report["memory"],
            "error": fmean(matrix["error"] for matrix in report["matrices"]),
            "phases": [phase.tree(rates) for phase in recorder.phases.values() if phase.seconds],
        }

    def _times(self, phase: Phase) -> float:
        """How often the whole shape has what was measured."""
        here = self.shape.values.get("num_hidden_layers")
        grows = phase.name.rpartition(": ")[2] not in ONCE
        return self.depth / here if self.depth and here and grows else 1.0


def one_pass(plan: Plan) -> dict[str, float]:
    """Flops of the parts of SparseGPT on all samples: what any other method does several times. Looks at one sample in
    one block of each kind.
    """
    model, samples, flops = plan.model, len(plan.draw.calibration), Counter[str]()
    counts = count_kinds(model)

    def visit(stop: Stop, block: Block) -> dict[int, Any]:
        tokens, count = Counter[str](), counts[kind_of_block(block)]

        def see(matrix: Matrix, x: Tensor) -> None:
            tokens[matrix.name] += sum(len(x_TC) for x_TC in matrix.tokens(x))

        for group in distinct_inputs(partial(stop.run, 0), block.matrices, see) if block.matrices else ():
            seen, columns = count * samples * tokens[group[0].name], group[0].shape[1]
            elements = sum(rows for rows, _ in (matrix.shape for matrix in group)) * columns
            flops.update(forward=2 * seen * elements, Gram=seen * columns * (columns + 1))
            flops.update(factor=count * columns**3 // 3, sweep=count * elements * columns)
        return {0: stop.run(0)}

    short_walk(model, model.walk(model.batches(plan.draw.calibration.take([0]), 1)), visit)
    return dict(flops)


def outlook(asked: Asked, progress: Progress) -> dict[str, Any]:
    """What `bench` would need, as plain values; nothing stays. Raises InputError when it is more than there is."""
    with scratch(asked.workdir) as folder:
        ready = Bench.of(asked, folder)
        found = ready.outlook(progress)
        return _about(ready) | found.tree() | {"left_out": found.possible(asked)[1]}


def bench(
    asked: Asked, progress: Progress, tell: Callable[[dict[str, Any]], None] = lambda found: None
) -> dict[str, Any]:
    """All methods on one checkpoint, as plain values. tell: gets what is known after each method. Nothing stays on the
    disk. Raises InputError when disk or memory do not suffice, before any weight is made.
    """
    with scratch(asked.workdir) as folder:
        ready = Bench.of(asked, folder)
        methods, lacking = ready.outlook(progress).possible(asked)
        for why in lacking.values():
            progress.notice(f"left out: {why}")
        start = time.perf_counter()
        ready.shape.filled(ready.dense, ready.device, progress)
        made = time.perf_counter() - start
        rates = measure(ready.device, folder, progress, asked.sizes)
        found = _about(ready) | {"made_seconds": made, "ceilings": rates, "left_out": lacking, "methods": []}
        for method in methods:
            found["methods"].append(ready.run(method, rates, progress))
            progress.line(f"{method}: {found['methods'][-1]['seconds']:.1f} s")
            tell(found)
        return found


def _about(ready: Bench) -> dict[str, Any]:
    """What is measured, and on what."""
    recipe = ready.recipe(ready.asked.chosen[0])
    data, most = suited(recipe, ready.shape.kind).data, ready.shape.values.get("max_position_embeddings", math.inf)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "obsprune": __version__,
        "shape": ready.asked.shape or SHAPE[ready.device.type],
        "blocks": ready.asked.blocks or ready.depth,
        "of": ready.depth,
        "samples": data.nsamples,
        "seqlen": min(data.seqlen, most) if ready.shape.kind.positional else None,
        "machine": machine(ready.device),
    }
