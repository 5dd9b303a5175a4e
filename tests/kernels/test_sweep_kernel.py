"""The sweep of a tile in Triton: against its definition, against core, by its laws, and inside a whole solve."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import compiled, solved, swept, swept_groups
from torch import Tensor

from obsprune.core import column_sweep
from obsprune.core.linalg import factorise
from obsprune.core.patterns import NofM, Pattern, PerRow, Unstructured
from obsprune.core.statistics import Gram
from obsprune.solvers.base import dead_first
from obsprune.solvers.sparsegpt import SparseGPT

Run = Callable[..., tuple[Tensor, ...]]


def tile(columns: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """V_BR, G_BB of K as a layer has it, keep_BR of half, and cost_B, which is 0 for a fifth."""
    random = torch.Generator().manual_seed(1000 * columns + rows)
    x_TB = torch.randn(2 * columns + 8, columns, generator=random, dtype=torch.float64)
    mix_BB = torch.eye(columns, dtype=torch.float64) + 0.5 * torch.rand(columns, columns, generator=random)
    K_BB = torch.linalg.cholesky((x_TB @ mix_BB).T @ (x_TB @ mix_BB)).T.contiguous()
    G_BB = torch.linalg.inv(K_BB) * K_BB.diagonal()[:, None]
    V_BR = torch.randn(columns, rows, generator=random, dtype=torch.float64)
    keep_BR = torch.rand(columns, rows, generator=random) < 0.5
    cost_B = K_BB.diagonal() * (torch.rand(columns, generator=random) < 0.8)
    return V_BR.to(dtype), G_BB.to(dtype), keep_BR, cost_B.to(dtype)


def by_definition(V_BR: Tensor, G_BB: Tensor, keep_BR: Tensor) -> Tensor:
    V_BR = V_BR.clone()
    for c in range(len(V_BR)):
        for j in range(c):
            V_BR[c] -= torch.where(keep_BR[j], 0, V_BR[j]) * G_BB[j, c]
    return V_BR


def groups_by_definition(V_BR: Tensor, G_BB: Tensor, cost_B: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Row by row: group by group, the m − n that cost least go; V anew each time, under the mask so far."""
    keep_BR = torch.ones_like(V_BR, dtype=torch.bool)
    for first in range(0, len(V_BR), m):
        for row in range(V_BR.shape[1]):
            V_B = by_definition(V_BR[:, row : row + 1], G_BB, keep_BR[:, row : row + 1])[:, 0]
            cost = [-1.0 if v == 0 else abs(v) * by for v, by in zip(V_B.tolist(), cost_B.tolist(), strict=True)]
            for c in sorted(range(first, first + m), key=lambda c: (cost[c], c))[: m - n]:
                keep_BR[c, row] = False
    return by_definition(V_BR, G_BB, keep_BR), keep_BR


def close(one: Tensor, other: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return float((one - other).abs().max()) <= (1e-5 if dtype == torch.float32 else 1e-13) * float(other.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("columns", "rows"), [(1, 1), (2, 3), (7, 17), (8, 16), (33, 5), (100, 4)], ids=lambda size: str(size)
)
def test_sweep(run: Run, columns: int, rows: int, dtype: torch.dtype) -> None:
    V_BR, G_BB, keep_BR, _ = tile(columns, rows, dtype)
    (out_BR,) = run(swept, V_BR, G_BB, keep_BR)
    assert out_BR.dtype == dtype
    assert close(out_BR, by_definition(V_BR, G_BB, keep_BR), dtype)


def test_a_whole_tile_of_128_columns(run: Run) -> None:
    V_BR, G_BB, keep_BR, _ = tile(128, 16)
    expected_BR = V_BR.clone()
    column_sweep.sweep(expected_BR, G_BB, keep_BR)
    assert close(run(swept, V_BR, G_BB, keep_BR)[0], expected_BR)
    assert not close(V_BR, expected_BR)


def test_any_strides_will_do(run: Run) -> None:
    V_BR, G_BB, keep_BR, _ = tile(10, 18)
    expected_BR = by_definition(V_BR, G_BB, keep_BR)
    part_BR = V_BR.repeat(1, 2)[:, :18]
    assert part_BR.stride() == (36, 1)
    (out_BR,) = run(swept, part_BR, G_BB.T.contiguous().T, keep_BR.T.contiguous().T)
    assert close(out_BR, expected_BR)


GROUPS = [(2, 4, 8, 17), (4, 8, 24, 3), (1, 4, 36, 2), (16, 32, 64, 2), (3, 6, 18, 5), (5, 7, 7, 1), (1, 1, 3, 4)]


@pytest.mark.parametrize(("n", "m", "columns", "rows"), GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_groups(run: Run, n: int, m: int, columns: int, rows: int, dtype: torch.dtype) -> None:
    V_BR, G_BB, _, cost_B = tile(columns, rows, dtype)
    expected_BR, keep_BR = groups_by_definition(V_BR, G_BB, cost_B, n, m)
    out_BR, chosen_BR = run(swept_groups, V_BR, G_BB, cost_B, n, m)
    assert torch.equal(chosen_BR, keep_BR)
    assert close(out_BR, expected_BR, dtype)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (16, 32)])
def test_groups_of_a_whole_tile_as_core_sweeps_them(run: Run, n: int, m: int) -> None:
    V_BR, G_BB, _, cost_B = tile(128, 16)
    expected_BR = V_BR.clone()

    def choose(V_MR: Tensor, columns: slice) -> Tensor:
        return NofM(n, m).keep(dead_first((V_MR.abs().T * cost_B[columns].abs()), cost_B[columns] == 0)).T

    keep_BR = column_sweep.sweep_groups(expected_BR, G_BB, choose, m, m - n)
    out_BR, chosen_BR = run(swept_groups, V_BR, G_BB, cost_B, n, m)
    assert torch.equal(chosen_BR, keep_BR)
    assert close(out_BR, expected_BR)


@st.composite
def small(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Whole numbers, few of them: every sum is exact, ties and zeros are everywhere, and some inputs are dead."""
    m = draw(st.integers(1, 8))
    n, columns, rows = draw(st.integers(0, m)), m * draw(st.integers(1, 3)), draw(st.integers(1, 18))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    V_BR = torch.randint(-2, 3, (columns, rows), generator=random).float()
    G_BB = torch.randint(-1, 2, (columns, columns), generator=random).float()
    G_BB *= torch.rand(columns, columns, generator=random) < 0.3
    return V_BR, G_BB, torch.randint(0, 3, (columns,), generator=random).float(), n, m


few = settings(max_examples=8, deadline=None)


@few
@given(small())
def test_ties_zeros_and_dead_columns(run: Run, case: tuple[Tensor, Tensor, Tensor, int, int]) -> None:
    V_BR, _, _, n, m = case
    expected_BR, keep_BR = groups_by_definition(*case)
    out_BR, chosen_BR = run(swept_groups, *case)
    assert torch.equal(chosen_BR, keep_BR)
    assert torch.equal(out_BR, expected_BR)
    assert bool((chosen_BR.unflatten(0, (-1, m)).sum(1) == n).all())
    assert torch.equal(run(swept, V_BR, case[1], chosen_BR)[0], out_BR)  # the mask given back


@few
@given(st.integers(1, 20), st.integers(1, 20))
def test_laws(run: Run, columns: int, rows: int) -> None:
    V_BR, G_BB, keep_BR, _ = tile(columns, rows)
    (out_BR,) = run(swept, V_BR, G_BB, keep_BR)
    order_R = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    assert torch.equal(out_BR[0], V_BR[0])
    assert torch.equal(run(swept, V_BR, G_BB, torch.ones_like(keep_BR))[0], V_BR)
    assert torch.equal(run(swept, 2 * V_BR, G_BB, keep_BR)[0], 2 * out_BR)
    assert torch.equal(run(swept, V_BR[:, order_R], G_BB, keep_BR[:, order_R])[0], out_BR[:, order_R])
    unread_BB = torch.full_like(G_BB, math.nan).tril() + G_BB.triu(1)
    assert torch.equal(run(swept, V_BR, unread_BB, keep_BR)[0], out_BR)


def layer() -> tuple[Tensor, Gram]:
    """W_RC of two tiles, and the Gram of correlated inputs, one of which is dead."""
    random = torch.Generator().manual_seed(0)
    mix_CC = torch.eye(144) + 0.5 * torch.rand(144, 144, generator=random) / 12
    x_TC = torch.randn(300, 144, generator=random) @ mix_CC
    x_TC[:, 5] = 0
    gram, W_RC = Gram(144), torch.randn(12, 144, generator=random)
    gram.add(x_TC)
    return W_RC, gram


def by_tiles(run: Run, W_RC: Tensor, gram: Gram, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """SparseGPT with nothing but matrix products around the kernels: Z_RC, keep_RC."""
    W_CR, K_CC, dead_C = W_RC.T, factorise(gram, SparseGPT().damping).K_CC, gram.H_CC.diagonal() == 0
    D_CR, keep_CR = torch.zeros_like(W_CR), torch.zeros_like(W_CR, dtype=torch.bool)
    group = pattern.group or 1
    width = 128 // group * group
    for first in range(0, len(W_CR), width):
        here = slice(first, min(first + width, len(W_CR)))
        K_BB, dead_B = K_CC[here, here], dead_C[here]
        U_BB, k_B = torch.linalg.inv(K_BB), K_BB.diagonal()
        V_BR = W_CR[here] + U_BB.T @ K_CC[:first, here].T @ D_CR[:first]
        if isinstance(pattern, NofM):
            V_BR, keep_BR = run(swept_groups, V_BR, k_B[:, None] * U_BB, k_B * ~dead_B, pattern.n, pattern.m)
        else:
            keep_RB = pattern.tile(len(W_RC), here.start, here.stop).keep(dead_first((V_BR.T * k_B).abs(), dead_B))
            (V_BR,) = run(swept, V_BR, k_B[:, None] * U_BB, keep_BR := keep_RB.T)
        keep_CR[here], D_CR[here] = keep_BR, W_CR[here] - V_BR.masked_fill(~keep_BR, 0)
    return (W_CR - D_CR).T, keep_CR.T


@pytest.mark.parametrize("pattern", [Unstructured(0.5), PerRow(0.6), NofM(2, 4), NofM(3, 6)], ids=str)
def test_a_solve_with_the_kernel_is_sparsegpts(run: Run, pattern: Pattern) -> None:
    W_RC, gram = layer()
    Z_RC, keep_RC = by_tiles(run, W_RC, gram, pattern)
    answer = SparseGPT().solve(W_RC, SparseGPT().prepare(gram), pattern)
    assert torch.equal(keep_RC, answer.keep)
    assert close(Z_RC, answer.weight)


CASES = [(128, 4096, None), (128, 4096, (2, 4)), (128, 22016, (16, 32)), (126, 50, (3, 6)), (96, 4096, (4, 8))]


@pytest.mark.parametrize(("columns", "rows", "kept"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_gpu_holds_a_tile_in_its_registers(
    compiler: Run, columns: int, rows: int, kept: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    used: dict[str, int] = compiler(compiled, columns, rows, dtype, kept)  # type: ignore[assignment]
    assert used["STACK"] == 0, f"registers spill: {used}"


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4), NofM(1, 72)], ids=str)
def test_sparsegpt_takes_the_kernel_where_it_runs(interpreter: Run, pattern: Pattern) -> None:
    W_RC, gram = layer()
    weight, keep, launches = interpreter(solved, W_RC, gram, pattern)
    answer = SparseGPT().solve(W_RC, SparseGPT().prepare(gram), pattern)
    assert launches == 2
    assert torch.equal(keep, answer.keep)
    assert close(weight, answer.weight)
