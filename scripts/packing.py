"""Sizes and speeds of packed checkpoints: python scripts/packing.py CHECKPOINT... (the tables of docs/formats.md).

Every matrix of the blocks of a dense checkpoint is pruned by magnitude, cast, packed and unpacked again; `gaussian` is
two random matrices of the size that large models have. Shares are of the pruned matrices' dense bytes; speeds are dense
bytes a second of one core's time, of whole files, best of three.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from obsprune.core.patterns import NofM, Pattern, Unstructured
from obsprune.models.load import load
from obsprune.models.packed import PackedFile, pack_file, unpack_file
from obsprune.progress import Silent

PATTERNS: dict[str, Pattern] = {"50 %": Unstructured(0.5), "60 %": Unstructured(0.6), "70 %": Unstructured(0.7),
                                "2:4": NofM(2, 4), "4:8": NofM(4, 8)}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def matrices(name: str) -> dict[str, Tensor]:
    """The dense weights of a checkpoint's blocks, as wide as in the model."""
    if name == "gaussian":
        return {str(index): torch.randn(2048, 4096) * 0.02 for index in range(2)}
    blocks = load(name, device="cpu").blocks
    return {
        matrix.name: weights[matrix.name]
        for block in blocks
        for weights in [block.weights()]
        for matrix in block.matrices
    }


def pruned(weight: Tensor, pattern: Pattern) -> Tensor:
    return weight.masked_fill(~pattern.keep(weight.abs()), 0.0)


def best(work: Callable[[], None]) -> float:
    """Seconds of this thread, the least of three times."""
    taken = []
    for _ in range(3):
        begin = time.thread_time()
        work()
        taken.append(time.thread_time() - begin)
    return min(taken)


def main(checkpoints: list[str]) -> None:
    torch.set_num_threads(1)
    print("| matrices of | dtype | pattern | dense MB | packed | pack MB/s | unpack MB/s |")
    print("|---|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        dense, packed, again = (Path(folder) / name for name in ("dense", "obsprune-1-of-1.safetensors", "again"))
        for name in checkpoints:
            weights = matrices(name)
            for label, dtype in DTYPES.items():
                for said, pattern in PATTERNS.items():
                    save_file({key: pruned(x, pattern).to(dtype) for key, x in weights.items()}, dense)
                    there = best(lambda: pack_file(dense, packed, Silent()))
                    back = best(lambda: unpack_file(PackedFile(packed), again, Silent()))
                    assert dense.read_bytes() == again.read_bytes()
                    size = dense.stat().st_size / 1e6
                    share = packed.stat().st_size / dense.stat().st_size
                    row = [Path(name).name, label, said, f"{size:.1f}", f"{share:.3f}"]
                    print("|", " | ".join([*row, f"{size / there:.0f}", f"{size / back:.0f}"]), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
