"""SparseGPT beside its authors' code, in one process: same weights, same inputs, by turns.

    python scripts/bench_peer.py CHECKOUT [--shape 768x768 --shape 2048x2048] [--threads 2] [--device cuda]
    python scripts/bench_peer.py CHECKOUT --shape-of llama-2-7b --device cuda [--blocks 2] [--nsamples 128]

CHECKOUT is a folder with their sparsegpt.py (github.com/IST-DASLab/sparsegpt), which is run as it is. The first form
takes single matrices, factorisation and sweep together, and tells the medians, their ratio, and our layer loss over
theirs. The second one takes a named shape with random weights: a few blocks through their class as their scripts drive
it (a forward a sample to measure, each matrix by itself, a forward a sample to hand on), and the same blocks through
`obsprune prune --solver sparsegpt`; both are scaled to all blocks.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from obsprune.bench.runs import Asked, Bench
from obsprune.bench.scratch import scratch
from obsprune.core.linalg import layer_loss
from obsprune.core.patterns import NofM, Pattern, Unstructured
from obsprune.core.statistics import Gram
from obsprune.evaluate.inference import now
from obsprune.models.load import Model
from obsprune.models.walk import Stop
from obsprune.plan import make_plan
from obsprune.progress import Silent
from obsprune.solvers.sparsegpt import SparseGPT

PATTERNS: list[tuple[Pattern, tuple[int, int]]] = [(Unstructured(0.5), (0, 0)), (NofM(2, 4), (2, 4))]
"""Ours, and what their function is told for it: how many of how many are pruned."""


# ------------------------------------------------------------------------------------------------ single matrices


def problem(rows: int, columns: int, device: str) -> tuple[Tensor, Gram]:
    """A random weight, and the Gram of inputs that are correlated as those of a layer are."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    mix_CC = torch.eye(columns, device=device) + 0.3 * random(columns, columns) / columns**0.5
    gram = Gram(columns, device=device)
    gram.add(random(2 * columns, columns) @ mix_CC)
    return 0.05 * random(rows, columns), gram


def timed(work: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    start = now(torch.device(device))
    with contextlib.redirect_stdout(io.StringIO()):
        answer = work()
    return now(torch.device(device)) - start, answer


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


# ------------------------------------------------------------------------------------------------ whole blocks


@dataclass(frozen=True)
class Peer:
    """Their class on a model of ours, whose walk brings every block its inputs."""

    module: Any
    model: Model

    def seconds(self, batches: list[dict[str, Tensor]]) -> float:
        """Of all blocks, one sample at a time; loading is not in it."""
        total = 0.0
        with self.model.walk(batches) as walk:
            for stop in walk:
                block = self.model.blocks[stop.index]
                with block.loaded(self.model.device):
                    start = now(self.model.device)
                    self._prune(stop, [matrix.parameter for matrix in block.matrices])
                    outputs = {key: stop.run(key) for key in stop.keys}
                    total += now(self.model.device) - start
                if stop.last:
                    break
                for key, output in outputs.items():
                    stop.leave(key, output)
        return total

    def _prune(self, stop: Stop, names: list[str]) -> None:
        layers = [self.model.network.get_submodule(name.removesuffix(".weight")) for name in names]
        methods = [self.module.SparseGPT(layer) for layer in layers]
        with ExitStack() as hooked:
            for layer, method in zip(layers, methods, strict=True):
                hook = layer.register_forward_hook(
                    lambda _, inputs, out, method=method: method.add_batch(inputs[0].data, out.data)
                )
                hooked.callback(hook.remove)
            for key in stop.keys:
                stop.run(key)
        with contextlib.redirect_stdout(io.StringIO()):
            for method in methods:
                method.fasterprune(0.5, percdamp=0.01, blocksize=128)
                method.free()


def compare_blocks(peer: Any, asked: Asked) -> Iterator[str]:
    """Theirs and ours on some blocks of a shape, scaled to all of them."""
    with scratch(asked.workdir) as folder:
        ready = Bench.of(asked, folder)
        ready.outlook(Silent()).possible(asked)
        ready.shape.filled(ready.dense, ready.device, Silent())
        plan = make_plan(ready.recipe("sparsegpt"))
        times = ready.depth / len(plan.model.blocks) if ready.depth else 1.0
        yield f"{asked.shape}, {len(plan.model.blocks)} of {ready.depth} blocks, {len(plan.draw.calibration)} samples"
        their = times * Peer(peer, plan.model).seconds(plan.model.batches(plan.draw.calibration, 1))
        yield f"theirs, without loading, writing and evaluation, scaled: {their:.1f} s"
        del plan
        one = ready.run("sparsegpt", {}, Silent())
        own = one["scaled_seconds"]
        alike = sum(p["seconds"] for p in one["phases"] if p["phase"] in ALIKE) * times
        yield f"ours, from the checkpoint to the evaluated result, scaled: {own:.1f} s: {their / own:.2f} x"
        yield f"ours, {', '.join(ALIKE)} alone, scaled: {alike:.1f} s: {their / alike:.2f} x"


ALIKE = ("forward", "Gram", "factor", "sweep", "losses", "rest")
"""Phases of ours that theirs has, too."""


def main(
    checkout: Path,
    shape: Annotated[list[str], typer.Option()] = ["768x768", "2048x2048", "768x3072"],  # noqa: B006  # never changed
    threads: int = 2,
    repeats: int = 7,
    device: str = "cpu",
    shape_of: str | None = None,
    blocks: int | None = 2,
    nsamples: int = 128,
    seqlen: int = 2048,
    workdir: Path | None = None,
) -> None:
    torch.set_num_threads(threads)
    if device == "cpu":
        torch.cuda.synchronize = lambda *_: None  # theirs waits for a GPU, whether there is one or not
    sys.path.insert(0, str(checkout))
    peer: Any = importlib.import_module("sparsegpt")
    print(f"torch {torch.__version__}, {device}, {threads} threads, {time.strftime('%Y-%m-%d')}")
    if shape_of:
        data = {"data": {"nsamples": nsamples, "seqlen": seqlen}}
        asked = Asked(shape_of, ("sparsegpt",), device, blocks, [data], workdir)
        for line in compare_blocks(peer, asked):
            print(line, flush=True)
        return
    print(f"medians of {repeats}")
    for one in shape:
        weight, gram = problem(*map(int, one.split("x")), device)
        for pattern, kept in PATTERNS:
            print(one, compare(peer, weight, gram, pattern, kept, repeats), flush=True)


if __name__ == "__main__":
    typer.run(main)
