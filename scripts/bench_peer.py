"""SparseGPT beside its authors' code: same process, same weights and Gram, factorisation and sweep together, in turns.

    python scripts/bench_peer.py CHECKOUT [--shape 768x768 --shape 2048x2048] [--threads 2] [--device cuda]

CHECKOUT is a folder with their sparsegpt.py (github.com/IST-DASLab/sparsegpt), which is run as it is. Told: the
medians, their ratio, and our layer loss over theirs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from obsprune.core.linalg import layer_loss
from obsprune.core.patterns import NofM, Pattern, Unstructured
from obsprune.core.statistics import Gram
from obsprune.solvers.sparsegpt import SparseGPT

PATTERNS: list[tuple[Pattern, tuple[int, int]]] = [(Unstructured(0.5), (0, 0)), (NofM(2, 4), (2, 4))]
"""Ours, and what their function is told for it: how many of how many are pruned."""


def problem(rows: int, columns: int, device: str) -> tuple[Tensor, Gram]:
    """A random weight, and the Gram of inputs that are correlated as those of a layer are."""
    generator = torch.Generator().manual_seed(0)
    mix_CC = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    gram = Gram(columns, device=device)
    gram.add((torch.randn(2 * columns, columns, generator=generator) @ mix_CC).to(device))
    return 0.05 * torch.randn(rows, columns, generator=generator).to(device), gram


def timed(work: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        answer = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, answer


def theirs(peer: Any, weight: Tensor, gram: Gram, kept: tuple[int, int]) -> Callable[[], Tensor]:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    layer.weight.data = weight.clone()
    method = peer.SparseGPT(layer)
    method.H = gram.H_CC.clone()

    def work() -> Tensor:
        method.fasterprune(0.5, *kept)
        return layer.weight.data

    return work


def ours(weight: Tensor, gram: Gram, pattern: Pattern) -> Callable[[], Tensor]:
    solver = SparseGPT()

    def work() -> Tensor:
        answer, keep = solver.search(weight, solver.prepare(gram), pattern)
        return answer.where(keep, 0)

    return work


def compare(peer: Any, weight: Tensor, gram: Gram, pattern: Pattern, kept: tuple[int, int], repeats: int) -> str:
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        their, b = timed(theirs(peer, weight, gram, kept), weight.device.type)
        own, a = timed(ours(weight, gram, pattern), weight.device.type)
        seconds.append((their, own))
    their, own = (statistics.median(side) for side in zip(*seconds, strict=True))
    loss = layer_loss(weight - a, gram.H_CC) / layer_loss(weight - b, gram.H_CC)
    return f"{pattern}: {their:.3f} s, ours {own:.3f} s: {their / own:.2f} x; loss over theirs {loss:.5f}"


def main(
    checkout: Path,
    shape: Annotated[list[str], typer.Option()] = ["768x768", "2048x2048", "768x3072"],  # noqa: B006  # never changed
    threads: int = 2,
    repeats: int = 7,
    device: str = "cpu",
) -> None:
    torch.set_num_threads(threads)
    if device == "cpu":
        torch.cuda.synchronize = lambda *_: None  # theirs waits for a GPU, whether there is one or not
    sys.path.insert(0, str(checkout))
    peer: Any = importlib.import_module("sparsegpt")
    print(f"torch {torch.__version__}, {device}, {threads} threads, medians of {repeats}")
    for one in shape:
        weight, gram = problem(*map(int, one.split("x")), device)
        for pattern, kept in PATTERNS:
            print(one, compare(peer, weight, gram, pattern, kept, repeats), flush=True)


if __name__ == "__main__":
    typer.run(main)
