"""How much faster several processes solve the matrices of one Llama block than one process does.

    OMP_NUM_THREADS=1 python scripts/speedup.py
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 scripts/speedup.py

The Grams are there (random, well-conditioned); measured is engine/layerwise.py: solve, and handing on the answers.
"""

from __future__ import annotations

import statistics
import time

import torch
import typer
from torch import nn

from obsprune.core.patterns import Unstructured
from obsprune.core.statistics import Gram
from obsprune.engine.dealing import Deal
from obsprune.engine.distributed import processes
from obsprune.engine.layerwise import Projection, solve
from obsprune.engine.streams import Measured, Stage
from obsprune.models.matrices import LinearMatrix
from obsprune.solvers import build


def matrices(hidden: int, inner: int) -> list[list[LinearMatrix]]:
    """By common input, as in Llama: q, k, v; o; gate, up; down."""
    groups = [{"q": hidden, "k": hidden, "v": hidden}, {"o": hidden}, {"gate": inner, "up": inner}, {"down": hidden}]
    widths = [hidden, hidden, hidden, inner]
    torch.manual_seed(0)
    return [
        [LinearMatrix(name, nn.Linear(width, rows, bias=False), torch.float32) for name, rows in group.items()]
        for group, width in zip(groups, widths, strict=True)
    ]


def gram(width: int) -> Gram:
    sums, x_TC = Gram(width), torch.randn(2 * width, width, generator=torch.Generator().manual_seed(width))
    sums.add(x_TC)
    return sums


def main(hidden: int = 768, inner: int = 2048, solver: str = "sparsegpt", repeats: int = 3) -> None:
    with processes() as ranks, torch.no_grad():
        seconds = []
        for _ in range(repeats):
            groups = matrices(hidden, inner)
            every = [matrix for group in groups for matrix in group]
            stage = Stage([Measured(gram(group[0].shape[1]), group) for group in groups], Deal.of(every, ranks))
            patterns = {matrix.name: Unstructured(0.5) for matrix in every}
            ranks.wait()
            start = time.perf_counter()
            solve(stage, Projection(build(solver, {}), patterns), lambda result: None)
            ranks.wait()
            seconds.append(time.perf_counter() - start)
        if ranks.first:
            print(f"{ranks.size} process(es), {solver}, {hidden} x {inner}: median {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    typer.run(main)
