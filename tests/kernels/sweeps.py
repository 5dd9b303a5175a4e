"""What the tests have done elsewhere: the kernels of the column sweep as functions that leave their arguments alone."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from obsprune.core.patterns import Pattern
from obsprune.core.statistics import Gram
from obsprune.solvers.sparsegpt import SparseGPT

H200 = ("cuda", 90, 32)


def swept(V_BR: Tensor, G_BB: Tensor, keep_BR: Tensor) -> tuple[Tensor]:
    from obsprune.kernels.column_sweep import sweep

    V_BR = V_BR.clone()
    sweep(V_BR, G_BB, keep_BR)
    return (V_BR,)


def swept_groups(V_BR: Tensor, G_BB: Tensor, cost_B: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    from obsprune.kernels.column_sweep import sweep_groups

    V_BR = V_BR.clone()
    keep_BR = sweep_groups(V_BR, G_BB, cost_B, n, m)
    return V_BR, keep_BR


class Recorder:
    """Stands for a kernel, and remembers what it was launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        self.grid = grid
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options


def compiled(columns: int, rows: int, dtype: torch.dtype, kept: tuple[int, int] | None) -> dict[str, int]:
    """The resources of the kernel that an H200 would be given: REG a thread, STACK where registers spill."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from obsprune.kernels import column_sweep

    kernel, column_sweep._sweep = column_sweep._sweep, Recorder()
    try:
        V_BR, G_BB = torch.zeros(columns, rows, dtype=dtype), torch.zeros(columns, columns, dtype=dtype)
        if kept is None:
            swept(V_BR, G_BB, V_BR == 0)
        else:
            swept_groups(V_BR, G_BB, V_BR[:, 0], *kept)
        launch = column_sweep._sweep
    finally:
        column_sweep._sweep = kernel
    arguments = list(zip(kernel.params, launch.args, strict=True))
    types = {param.name: kind(value, param.is_constexpr) for param, value in arguments}
    constants = {(i,): value for i, (param, value) in enumerate(arguments) if types[param.name] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(launch.args) if (i,) not in constants and even(x)}
    made = triton.compile(ASTSource(kernel, types, constants, aligned), target=GPUTarget(*H200), options=launch.options)
    return resources(made.asm["cubin"])


def kind(value: Any, constant: bool) -> str:
    """What Triton takes an argument for."""
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    names = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*i1"}
    return names[value.dtype] if isinstance(value, Tensor) else "i32"


def even(value: Any) -> bool:
    """Whether Triton knows that 16 divides an argument: an address, as torch allots them, or a number."""
    return isinstance(value, Tensor) or value % 16 == 0


def resources(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True)
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK):(\d+)", told.stdout)}


def solved(W_RC: Tensor, gram: Gram, pattern: Pattern) -> tuple[Tensor, Tensor, int]:
    """SparseGPT's own answer, and how many tiles went to a kernel."""
    from obsprune.kernels import available, column_sweep

    assert available(W_RC.device)  # which launches one itself
    with mock.patch.object(column_sweep, "_launch", wraps=column_sweep._launch) as launch:
        answer = SparseGPT().solve(W_RC, SparseGPT().prepare(gram), pattern)
    return answer.weight, answer.keep, launch.call_count
