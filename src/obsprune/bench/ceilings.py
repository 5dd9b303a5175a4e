"""What a machine does at best: products of large matrices, copies of large tensors, a large file written and read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from obsprune.bench.work import MEMORY, READ, SENT, TF32, WRITTEN
from obsprune.core.products import matmul_settings
from obsprune.evaluate.inference import now
from obsprune.models.checkpoint import read_tensors, write_shard
from obsprune.progress import Progress

REPEATS = 5
"""Of which the fastest counts."""


@final
@dataclass(frozen=True)
class Sizes:
    """Of what is measured with. side: of the matrices; bytes: of a copy and of a file."""

    side: int
    bytes: int


SIZES = {"cuda": Sizes(8192, 2**31), "cpu": Sizes(1536, 2**28)}
FORMATS = {"cuda": ("float32", TF32, "bfloat16", "float16", "float64"), "cpu": ("float32", "bfloat16", "float64")}


def measure(device: torch.device, folder: Path, progress: Progress, sizes: Sizes | None = None) -> dict[str, float]:
    """Flops/s by format, bytes/s by way, of what is fastest of some tries. folder: on the disk that is measured."""
    size = sizes or SIZES[device.type]
    works: dict[str, Callable[[], float]] = {
        name: partial(_product_rate, name, device, size.side) for name in FORMATS[device.type]
    }
    works[MEMORY] = partial(_copy_rate, device, device, size.bytes)
    if device.type == "cuda":
        works[SENT] = partial(_copy_rate, torch.device("cpu"), device, size.bytes)
    progress.stage("ceilings of this machine", len(works) + 1)
    rates = {}
    for name, work in works.items():
        rates[name] = work()
        progress.step()
    rates[WRITTEN], rates[READ] = _file_rates(folder / "ceiling.safetensors", size.bytes)
    progress.step()
    return rates


def _fastest(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the best of some tries, after one that warms up."""
    work()
    found = []
    for _ in range(REPEATS):
        start = now(device)
        work()
        found.append(now(device) - start)
    return min(found)


def _product_rate(name: str, device: torch.device, side: int) -> float:
    dtype = torch.float32 if name == TF32 else getattr(torch, name)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with matmul_settings(fp32_precision="tf32" if name == TF32 else "ieee"):
        return 2 * side**3 / _fastest(device, lambda: torch.mm(a, b, out=out))


def _copy_rate(source: torch.device, target: torch.device, size: int) -> float:
    """Within a device every byte is read and written; between two it passes the bus once."""
    a = torch.zeros(size // 4, device=source, pin_memory=source != target)
    b = torch.empty(size // 4, device=target)
    return (2 if source == target else 1) * size / _fastest(target, lambda: b.copy_(a))


def _file_rates(path: Path, size: int) -> tuple[float, float]:
    """(written, read): a file as checkpoints have it, written and seen to the disk as a run does it, then read, from
    the system's cache where there is room for it, as a block's weights are.
    """
    x = torch.ones(size // 4)
    try:
        start = time.perf_counter()
        write_shard(path, {"x": x})
        written = time.perf_counter() - start
        return size / written, size / _fastest(torch.device("cpu"), lambda: _read(path, x))
    finally:
        path.unlink(missing_ok=True)


def _read(path: Path, into: Tensor) -> None:
    into.copy_(read_tensors(path, ["x"])["x"])
