"""A walk in which blocks like one met before are not run: they hand on what that one did. So what is tried on the way
costs as much for a deep model as for a shallow one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from obsprune.models.blocks import Block
from obsprune.models.load import Model
from obsprune.models.walk import Stop, Walk

Visit = Callable[[Stop, Block], Mapping[int, Any]]
"""Does what is to be measured at a block; returns the block's outputs by key."""


@dataclass(frozen=True)
class Line:
    """Seconds that grow with the number of batches."""

    fixed: float = 0.0
    each: float = 0.0

    def at(self, count: float) -> float:
        return self.fixed + self.each * count

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> Line:
        """Through two points (batches, seconds); without a fixed part where they are one, or it would be negative."""
        (a, s), (b, t) = few, many
        each = max(t - s, 0.0) / (b - a) if b > a else t / b
        return cls(max(t - each * b, 0.0), each)


@dataclass
class Stopwatch:
    """Seconds by name; `lap` adds the time since the last one."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = 0.0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forgets the time since the last lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.began = time.perf_counter()

    def lap(self, name: str) -> None:
        before = self.began
        self.start()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.began - before


Kind = Hashable


def kind_of_block(block: Block) -> Kind:
    """Equal for blocks that cost the same: the same parameters, the same of them to prune."""
    parameters = tuple((name, tuple(p.shape)) for name, p in block.module.named_parameters())
    return type(block.module), parameters, tuple(matrix.name.removeprefix(block.name) for matrix in block.matrices)


def count_kinds(model: Model) -> dict[Kind, int]:
    """How many blocks there are of each kind, in order of the first."""
    counts: dict[Kind, int] = {}
    for block in model.blocks:
        counts[kind_of_block(block)] = counts.get(kind_of_block(block), 0) + 1
    return counts


def short_walk(model: Model, walk: Walk, visit: Visit) -> float:
    """Walks; `visit` is called, the block being loaded, for the first block of each kind. Returns the seconds between
    the blocks, and after them.
    """
    known: dict[Kind, Mapping[int, Any]] = {}
    watch = Stopwatch(model.device)
    with walk:
        for stop in walk:
            block, kind = model.blocks[stop.index], kind_of_block(model.blocks[stop.index])
            if kind not in known:
                with block.loaded(model.device):
                    known[kind] = visit(stop, block)
            watch.start()
            for key in [key for key in stop.keys if walk.calls[key][0] is stop.module]:  # some may have left
                stop.leave(key, known[kind][key])
            watch.lap("between")
    return watch.seconds["between"]


def floats(tree: Any) -> list[Tensor]:
    """The floating tensors among what enters or leaves a block."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]
