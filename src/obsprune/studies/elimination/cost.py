"""What elimination–compensation's score costs, in units of one back-propagation of the same batch: floating-point
operations, which are the same everywhere, and seconds, which are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import final

import torch
from torch.utils.flop_counter import FlopCounterMode

from obsprune.core.elimination import Sketch, of_outputs
from obsprune.engine.curvature import Trainee, gradients
from obsprune.engine.training import measure
from obsprune.models.samples import Batch
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Figure, Line
from obsprune.studies.base import Cell, Outcome, Study, Table
from obsprune.studies.elimination.data import Digits
from obsprune.studies.elimination.methods import listen
from obsprune.studies.material import Material

Work = Callable[[Trainee, Batch], object]
UNIT = "back-propagation"
WORK: dict[str, Work] = {
    UNIT: gradients,
    "sketch": lambda trainee, batch: listen(trainee, [batch], Sketch(torch.Generator().manual_seed(0))),
    "exact": lambda trainee, batch: listen(trainee, [batch], of_outputs),
    "local": lambda trainee, batch: measure(trainee, [batch]),
}
"""The unit first: forward, backward, gradients of all weights. local: the layer-wise statistics that SparseGPT needs,
and the biases' means with them."""


@final
@dataclass(frozen=True)
class ScoreCost(Study):
    """widths, depth: of networks from MNIST's 784 pixels to 10 classes; batch: random images; repeats: of each
    measurement of time, all kinds of work in turn, of which the median counts.
    """

    depth: int = 2
    widths: list[int] = field(default_factory=lambda: [100, 300, 1000])
    batch: int = 512
    repeats: int = 15

    def run(self, material: Material, progress: Progress) -> Outcome:
        progress.stage("cost", len(self.widths))
        flops: dict[str, list[float]] = {name: [] for name in WORK}
        seconds: dict[str, list[float]] = {name: [] for name in WORK}
        for width in self.widths:
            network = Digits().network(self.depth, width, seed=0)
            trainee = Trainee.of(network, lambda batch, network=network: network(batch["x"]))  # type: ignore[misc]
            generator = torch.Generator().manual_seed(0)
            batch = {"x": torch.rand(self.batch, 784, generator=generator), "labels": torch.arange(self.batch) % 10}
            for name, ratio in in_units(
                {name: operations(work, trainee, batch) for name, work in WORK.items()}
            ).items():
                flops[name].append(ratio)
            for name, ratio in in_units(self._timed(trainee, batch)).items():
                seconds[name].append(ratio)
            progress.step(f"width {width}")
        return self._outcome(flops, seconds)

    def _timed(self, trainee: Trainee, batch: Batch) -> dict[str, float]:
        """Median seconds."""
        taken: dict[str, list[float]] = {name: [] for name in WORK}
        for _ in range(self.repeats + 1):
            for name, work in WORK.items():
                begin = time.perf_counter()
                work(trainee, batch)
                taken[name].append(time.perf_counter() - begin)
        return {name: median(several[1:]) for name, several in taken.items()}  # the first warms up

    def _outcome(self, flops: dict[str, list[float]], seconds: dict[str, list[float]]) -> Outcome:
        kinds = {"operations": flops, "seconds": seconds}
        values = {
            f"{name}.{kind}.{width}": ratio
            for kind, ratios in kinds.items()
            for name, several in ratios.items()
            for width, ratio in zip(self.widths, several, strict=True)
        }
        rows: list[list[Cell]] = [
            [name, *(ratios[name][i] for i in range(len(self.widths)) for ratios in kinds.values())] for name in WORK
        ]
        columns = ["work", *(f"{kind}, width {width}" for width in self.widths for kind in kinds)]
        panels = [
            Curves(f"cost in {kind}", "width", f"in units of one {UNIT}",
                   {name: Line(self.widths, several) for name, several in ratios.items()}, log_y=True)
            for kind, ratios in kinds.items()
        ]  # fmt: skip
        title = f"In units of one {UNIT}, batch of {self.batch}, {torch.get_num_threads()} thread"
        return Outcome(values, [Table(title, columns, rows)], [Figure("cost", panels)])


def operations(work: Work, trainee: Trainee, batch: Batch) -> float:
    """Floating-point operations of matrix products."""
    with FlopCounterMode(display=False) as counter:
        work(trainee, batch)
    return float(counter.get_total_flops())


def in_units(amounts: dict[str, float]) -> dict[str, float]:
    """Of one back-propagation."""
    return {name: amount / amounts[UNIT] for name, amount in amounts.items()}
