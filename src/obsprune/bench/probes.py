"""What is timed in a run, and where. The engine knows nothing of it: as by a profiler, functions are exchanged while a
run is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from obsprune import pipeline
from obsprune.bench.phases import Inner, Recorder, part, stage, whole
from obsprune.bench.work import READ, SENT, WRITTEN, Counted, Work, cross, factor, file, gram, sweep
from obsprune.core.statistics import Cross, Gram
from obsprune.engine import layerwise, rounds
from obsprune.engine.finetune import Tuning
from obsprune.engine.matching import Matching
from obsprune.engine.rundir import RunDir
from obsprune.engine.steps import Newton
from obsprune.engine.streams import TwoStreams
from obsprune.engine.teacher import Lesson
from obsprune.models import blocks
from obsprune.models.ahead import ReadAhead
from obsprune.models.blocks import Block
from obsprune.models.walk import Stop
from obsprune.solvers.admm import ADMM, Scaled
from obsprune.solvers.base import Solver
from obsprune.solvers.refitted import ExactlyRefitted, Refitted
from obsprune.solvers.sparsegpt import SparseGPT


@dataclass(frozen=True)
class Probe:
    """A function of the run and the phase it is. inner: what becomes of phases inside it; work: from the call's
    arguments, where a formula says it better than the calls of torch in it.
    """

    phase: str
    owner: Any
    name: str
    inner: Inner = part
    work: Callable[..., Work] | None = None

    def around(self, real: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        """The function, watched."""

        @wraps(real)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with recorder.open(self.phase, self.inner), self._counting():
                if self.work is not None:
                    recorder.add(self.work(*args, **kwargs))
                return real(*args, **kwargs)

        return watched

    def _counting(self) -> AbstractContextManager[Any]:
        """Where a formula says what has to be done, calls of torch are not counted, and not slowed down by it."""
        return nullcontext() if self.work is None else torch._C.DisableTorchFunction()


def _loaded(module: Any, tensors: Any, device: Any, what: str) -> Work:
    ways = (READ,) if device.type == "cpu" else (READ, SENT)
    return file(tensors.values(), *ways)


def _committed(run: RunDir, block: str, tensors: Any, *_: Any, **facts: Any) -> Work:
    return file(tensors.values(), WRITTEN)


def _swept(solver: SparseGPT, W_RC: Any, state: Any, pattern: Any) -> Work:
    return sweep(W_RC, state.H_CC)


PROBES = (
    Probe("preparation", pipeline, "prepare", whole),
    Probe("allocation", pipeline, "share_out", stage),
    Probe("rounds", pipeline, "prune_again", stage),
    Probe("evaluation", pipeline, "evaluate", stage),
    Probe("opening", pipeline, "open_result", whole),
    Probe("load", blocks, "assign", whole, _loaded),
    Probe("load", Block, "_parameters", whole),
    Probe("load", ReadAhead, "read", whole),
    Probe("forward", Stop, "run"),
    Probe("Gram", Gram, "add", whole, lambda self, x_TC: gram(self.H_CC, x_TC)),
    Probe("Gram", Cross, "add", whole, lambda self, y_TR, x_TC: cross(self.K_RC, x_TC)),
    Probe("factor", SparseGPT, "prepare", whole, lambda self, gram: factor(gram.H_CC)),
    Probe("factor", ADMM, "prepare", whole),
    Probe("factor", Scaled, "inverse", whole),
    Probe("sweep", SparseGPT, "search", whole, _swept),
    Probe("ADMM", ADMM, "search"),
    Probe("refit", Refitted, "search"),
    Probe("refit", ExactlyRefitted, "search"),
    Probe("losses", Solver, "solve"),
    Probe("losses", layerwise, "outcome"),
    Probe("junctions", TwoStreams, "_junctions", whole),
    Probe("targets", TwoStreams, "_corrected"),
    Probe("matching", Matching, "__call__", whole),
    Probe("write", RunDir, "commit", whole, _committed),
    Probe("write", RunDir, "finish", whole),
    Probe("write", Block, "tensors", whole),
    Probe("teaching", rounds, "teach"),
    Probe("fine-tuning", Tuning, "run", whole),
    Probe("gradients", Newton, "candidates"),
    Probe("judging", Lesson, "score"),
)
"""In no order: a call of one inside another is told by the latter's `inner`."""


@contextmanager
def watched(recorder: Recorder, probes: tuple[Probe, ...] = PROBES) -> Iterator[None]:
    """While open, whatever is pruned in this process tells `recorder` its phases."""
    with ExitStack() as restored:
        for probe in probes:
            real = vars(probe.owner)[probe.name]
            setattr(probe.owner, probe.name, probe.around(real, recorder))
            restored.callback(setattr, probe.owner, probe.name, real)
        restored.enter_context(Counted(recorder.add))
        yield
