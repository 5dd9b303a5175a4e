"""How time and memory grow with width and tokens: a Llama of two blocks, small to large, and laws fitted to them.

Legend: d width, N calibration tokens. A pass of N tokens through a matrix and the Gram of its inputs take N d², its
factorisation and its sweep d³; Grams and weights hold d² numbers, waiting activations N d.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from obsprune import pipeline
from obsprune.bench.phases import Recorder
from obsprune.bench.probes import watched
from obsprune.bench.runs import Asked, refuse
from obsprune.bench.scratch import scratch
from obsprune.errors import InputError
from obsprune.evaluate.inference import machine, now
from obsprune.models.activations import trim_heap
from obsprune.models.load import choose_device
from obsprune.models.shapes import Shape, find_shape
from obsprune.progress import Progress, Silent
from obsprune.report.memory import MemoryWatch, anonymous_bytes

LIKE = "llama-2-7b"
"""Whose proportions the blocks have."""
HEAD, BLOCKS, VOCABULARY = 64, 2, 512
REPEATS = 3
"""Of which the fastest counts, in time and in memory."""
BY_TOKENS, BY_WIDTH = ("forward", "Gram"), ("factor", "sweep", "losses", "ADMM", "refit")
"""Phases by what they grow with."""
Law = Callable[[float, float], float]
LAWS: dict[str, dict[str, Law]] = {
    "seconds": {"d³": lambda d, n: d**3, "N·d²": lambda d, n: n * d**2, "1": lambda d, n: 1.0},
    "bytes": {"d²": lambda d, n: d**2, "N·d": lambda d, n: n * d, "1": lambda d, n: 1.0},
}
"""Terms in d and N that a quantity is fitted by."""


@final
@dataclass(frozen=True)
class Grid:
    """What is tried. seqlen: tokens of a sequence, of which N has `counts`."""

    widths: Sequence[int]
    counts: Sequence[int]
    seqlen: int
    dtype: str


OWN = ("data.nsamples", "data.seqlen", "data.heldout", "evaluation")
"""Settings that come from the grid."""
GRIDS = {
    "cpu": Grid((192, 384, 576, 768), (2, 4, 8, 16), 256, "float32"),
    "cuda": Grid((1024, 2048, 4096, 8192), (16, 32, 64, 128), 2048, "bfloat16"),
}


def growth(
    asked: Asked,
    progress: Progress,
    tell: Callable[[dict[str, Any]], None] = lambda found: None,
    grid: Grid | None = None,
) -> dict[str, Any]:
    """Time and memory of the first method at every width and number of tokens, and laws fitted to them, as plain
    values. On a CPU it is processor time of one thread: what else the machine does counts little. tell: gets what is
    known after each point. Raises InputError where another shape, or other samples, are asked for.
    """
    if asked.shape or asked.blocks:
        raise InputError(f"growth has blocks of its own, like {LIKE}'s in all widths; leave --shape and --blocks out")
    refuse(asked.settings, OWN, "leave it out: the sizes of --growth are a grid's")
    asked.recipe(asked.chosen[0], Path(), "")  # what is wrong with it is said before a model is made
    device = choose_device(asked.device)
    chosen = grid or GRIDS[device.type]
    points: list[dict[str, Any]] = []
    found = {"method": asked.chosen[0], "machine": machine(device), "points": points}
    with scratch(asked.workdir) as folder, _clock(device) as clock:
        progress.stage("growth", len(chosen.widths) * (1 + len(chosen.counts)))
        for width in chosen.widths:
            model = folder / str(width)
            model.mkdir()
            _llama(width, chosen).filled(model, device, Silent())
            dataset = _llama(width, chosen).samples(model, max(chosen.counts) + 1)
            progress.step()
            for count in chosen.counts:
                trials = [_trial(asked, model, dataset, count, chosen, clock) for _ in range(REPEATS)]
                points.append(_best(trials) | {"width": width, "tokens": count * chosen.seqlen})
                progress.step(f"width {width}, {count * chosen.seqlen:,} tokens: {points[-1]['seconds']:.2f} s")
                tell(found)
    return found | {"laws": laws(points)}


def laws(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was measured, as sums of the terms of LAWS, and the powers that fit best where nothing is assumed."""
    tokens, width = _columns(points, ("tokens", "width"))
    return {
        **{quantity: fitted(points, quantity, terms) for quantity, terms in LAWS.items()},
        "powers": {
            "by_width": _powers(points, "by_width", {"d": width}),
            "by_tokens": _powers(points, "by_tokens", {"N": tokens, "d": width}),
        },
    }


def fitted(points: Sequence[Mapping[str, Any]], quantity: str, terms: Mapping[str, Law]) -> dict[str, Any]:
    """Coefficients, none negative, of the sum that is nearest in proportion; how far it is at most from a point, as a
    share of it; and the share of each term at the largest point.
    """
    found = np.array([point[quantity] for point in points])
    values = np.array([[law(p["width"], p["tokens"]) for law in terms.values()] for p in points])
    solved = _solved(values / found[:, None])
    parts = values * solved
    told = parts.sum(1)
    return {
        "coefficients": dict(zip(terms, map(float, solved), strict=True)),
        "farthest": float(np.abs(told / found - 1).max()),
        "shares": dict(zip(terms, map(float, parts[-1] / told[-1]), strict=True)),
    }


def _solved(matrix: Any) -> Any:
    """The vector x, none of it negative, for which matrix·x is nearest to ones: what comes out most negative is left
    out, one after the other.
    """
    scale, left = matrix.max(0), list(range(matrix.shape[1]))
    x = np.zeros(matrix.shape[1])
    while True:
        some = np.linalg.lstsq((matrix / scale)[:, left], np.ones(len(matrix)), rcond=None)[0]
        if (some >= 0).all():
            x[left] = some
            return x / scale
        left.pop(int(np.argmin(some)))


def _columns(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[Any]:
    return (np.log([float(point[name]) for point in points]) for name in names)


def _powers(points: Sequence[Mapping[str, Any]], quantity: str, logarithms: Mapping[str, Any]) -> dict[str, float]:
    """The exponents of a product of powers, by least squares of logarithms."""
    (found,) = _columns(points, (quantity,))
    matrix = np.stack([*logarithms.values(), np.ones(len(points))], 1)
    return dict(zip(logarithms, map(float, np.linalg.lstsq(matrix, found, rcond=None)[0]), strict=False))


def _llama(width: int, grid: Grid) -> Shape:
    like = find_shape(LIKE)
    inner = like.values["intermediate_size"] / like.values["hidden_size"]
    heads = max(1, width // HEAD)
    values = {
        "hidden_size": width, "intermediate_size": HEAD * round(inner * width / HEAD), "num_attention_heads": heads,
        "num_key_value_heads": heads, "num_hidden_layers": BLOCKS, "vocab_size": VOCABULARY,
        "max_position_embeddings": grid.seqlen,
    }  # fmt: skip
    return replace(like, dtype=grid.dtype, values={**like.values, **values})


def _trial(
    asked: Asked, model: Path, dataset: str, count: int, grid: Grid, clock: Callable[[], float]
) -> dict[str, float]:
    """One run: seconds but for its preparation, those of BY_TOKENS and of BY_WIDTH, and the bytes it took at most."""
    data = {"data": {"nsamples": count, "seqlen": grid.seqlen, "heldout": 1}, "evaluation": ["none"]}
    recipe = replace(asked, settings=[*asked.settings, data]).recipe(asked.chosen[0], model, dataset)
    recorder = Recorder(clock)
    trim_heap()
    before = anonymous_bytes()
    with MemoryWatch() as memory, watched(recorder):
        pipeline.prune(recipe, model / "out", Silent(), force=True)
    taken = {name: phase.seconds for name, phase in recorder.phases.items()}
    return {
        "seconds": recorder.total - taken["preparation"],
        "by_tokens": sum(taken.get(name, 0.0) for name in BY_TOKENS),
        "by_width": sum(taken.get(name, 0.0) for name in BY_WIDTH),
        "bytes": memory.peak.get("device_bytes", memory.peak["host_bytes"] - before),
    }


def _best(trials: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: min((trial[name] for trial in trials), default=math.nan) for name in trials[0]}


@contextmanager
def _clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """The device's own; on a CPU of the processor, on one thread."""
    if device.type != "cpu":
        yield partial(now, device)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield time.process_time
    finally:
        torch.set_num_threads(threads)
