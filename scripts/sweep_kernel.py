"""One tile of SparseGPT's columns on a GPU: the kernel beside plain torch, by turns.

    python scripts/sweep_kernel.py [--rows 4096 --rows 22016] [--columns 128] [--kept 2:4] [--repeats 20]

Told: medians, their ratio, and the largest difference as a share of the largest term. With TRITON_INTERPRET=1 and
--device cpu it runs without a GPU; those times say nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from obsprune.core import column_sweep as plain
from obsprune.core.patterns import NofM
from obsprune.kernels import column_sweep as kernel


def timed(work: Callable[[Tensor], object], V_BR: Tensor) -> tuple[float, Tensor]:
    V_BR, wait = V_BR.clone(), torch.cuda.synchronize if V_BR.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    work(V_BR)
    wait()
    return time.perf_counter() - start, V_BR


def sweeps(V_BR: Tensor, kept: str) -> list[Callable[[Tensor], object]]:
    """Plain torch, and the kernel."""
    B = len(V_BR)
    G_BB, keep_BR = torch.rand(B, B, device=V_BR.device) / B, torch.rand_like(V_BR) < 0.5
    if not kept:
        return [lambda V: plain.sweep(V, G_BB, keep_BR), lambda V: kernel.sweep(V, G_BB, keep_BR)]
    n, m = map(int, kept.split(":"))
    return [
        lambda V: plain.sweep_groups(V, G_BB, lambda V_MR, _: NofM(n, m).keep(V_MR.abs().T).T, m, m - n),
        lambda V: kernel.sweep_groups(V, G_BB, torch.ones_like(V[:, 0]), n, m),
    ]


def main(
    rows: Annotated[list[int], typer.Option()] = [4096, 12288, 22016],  # noqa: B006 - Typer reads it, nobody writes it
    columns: int = 128,
    kept: str = "",
    repeats: int = 20,
    device: str = "cuda",
) -> None:
    for count in rows:
        V_BR = torch.randn(columns, count, device=device)
        works = sweeps(V_BR, kept)
        turns = [[timed(work, V_BR) for work in works] for _ in range(repeats + 1)][1:]  # the first one compiles
        slow, fast = (statistics.median(seconds for seconds, _ in turn) for turn in zip(*turns, strict=True))
        apart = float((turns[0][0][1] - turns[0][1][1]).abs().max() / turns[0][0][1].abs().max())
        print(
            f"{columns} x {count} {kept or 'given mask'}: torch {slow * 1e3:.3f} ms, kernel {fast * 1e3:.3f} ms, "
            f"{slow / fast:.1f} x, apart {apart:.1e}"
        )


if __name__ == "__main__":
    typer.run(main)
