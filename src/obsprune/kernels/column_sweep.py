"""core/column_sweep.py in one launch: the columns of a tile of SparseGPT, one after the other.

Legend: as there: B columns of a tile, each a row of memory; R rows of the layer; V_c −= Σ_{j<c} G_jc V_j over the j
that go; of G_BB only what is above the diagonal is read. In the kernels: ROWS rows, columns in GROUPS groups of WIDTH.

A program holds all columns of a few rows in registers. Rows do not know each other, so nothing is shared or read twice.
Registers have no index, so a column is found by a sum over places that are zero but for one. Over all columns that
would double the work of a step. So a group is taken out first, and steps look for their columns in it: a step is one
pass over all columns, V −= G r, and a group another one.

What Triton 3.7.1 makes of it for an H200, B = 128, float32, mask given; instructions are those of a warp for a column:

    WIDTH   ROWS   warps   instructions   instructions / rows   registers of a thread
    8       8      1       112            14.0                  80
    8       16     1       156            9.8                   120
    8       16     2       118            14.7                  96     warps wait for each other at every step
    8       32     1       309            9.7                   207
    4       16     1       174            10.9                  125
    16      16     1       231            14.4                  136

With 16 rows, 4096 rows are 256 programs for 132 multiprocessors. In float64 8 rows take the same bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 8
"""Columns of a group where no pattern says how many."""

ROW_BYTES = 64
"""Of a column in a program."""


def sweep(V_BR: Tensor, G_BB: Tensor, keep_BR: Tensor) -> None:
    """Brings V to its final values, in place, for a mask that is known."""
    _launch(V_BR, G_BB, keep_BR, None, None, WIDTH)


def sweep_groups(V_BR: Tensor, G_BB: Tensor, cost_B: Tensor, n: int, m: int) -> Tensor:
    """The same for n:m, a group's mask being chosen by V on reaching it, as it is if all of the group stay: keep_BR.

    The n highest |V|·cost stay, ties prune the lowest index, and zeros go before all others. cost_B is what a unit of V
    costs: diag K, and 0 where an input is dead, so that these go next (solvers.base.dead_first). m divides B.
    """
    assert len(V_BR) % m == 0
    keep_BR = torch.empty_like(V_BR, dtype=torch.bool)
    _launch(V_BR, G_BB, keep_BR, cost_B.contiguous(), n, m)
    return keep_BR


def _launch(V_BR: Tensor, G_BB: Tensor, keep_BR: Tensor, cost_B: Tensor | None, n: int | None, m: int) -> None:
    columns, rows = V_BR.shape
    at_once, groups = ROW_BYTES // V_BR.itemsize, triton.next_power_of_2(triton.cdiv(columns, m))
    with torch.cuda.device_of(V_BR):  # type: ignore[no-untyped-call]
        _sweep[(triton.cdiv(rows, at_once),)](
            V_BR, G_BB, keep_BR, cost_B, columns, rows, *V_BR.stride(), *G_BB.stride(), *keep_BR.stride(), n, m,
            groups, triton.next_power_of_2(m), at_once, num_warps=1,
        )  # fmt: skip


@triton.jit
def _sweep(
    V: tl.tensor, G: tl.tensor, keep: tl.tensor, cost: tl.tensor, B: tl.tensor, R: tl.tensor, v_b: tl.tensor,
    v_r: tl.tensor, g_j: tl.tensor, g_c: tl.tensor, k_b: tl.tensor, k_r: tl.tensor, n: tl.constexpr, m: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows. n and cost: None where the mask is given; v_b …: strides.

    A place of V is written after it was read, whoever did: what is written there is made of what was read.
    """
    row_R, group_G, place_W = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, GROUPS), tl.arange(0, WIDTH)
    column_GW = group_G[:, None] * m + place_W[None, :]
    real_GW = (place_W < m)[None, :] & (column_GW < B)
    real_GWR = real_GW[:, :, None] & (row_R < R)[None, None, :]
    V_GWR = tl.load(V + column_GW[:, :, None] * v_b + (row_R * v_r)[None, None, :], mask=real_GWR, other=0.0)
    for group in range(tl.cdiv(B, m)):
        first = group * m
        column_W = first + place_W
        real_W = (place_W < m) & (column_W < B)
        real_WR = real_W[:, None] & (row_R < R)[None, :]
        V_WR = tl.sum(tl.where((group_G == group)[:, None, None], V_GWR, 0.0), 0)
        keep_at_WR = keep + column_W[:, None] * k_b + (row_R * k_r)[None, :]
        if n is None:
            keep_WR = tl.load(keep_at_WR, mask=real_WR, other=1) != 0
        else:
            cost_W = tl.load(cost + column_W, mask=real_W, other=0.0)
            scores_WR = tl.where(V_WR == 0, -float("inf"), tl.abs(V_WR) * cost_W[:, None])
            keep_WR = _best(scores_WR, place_W, n, m)
            tl.store(keep_at_WR, keep_WR, mask=real_WR)
        for step in range(m):
            r_R = _at(tl.where(keep_WR, 0.0, V_WR), place_W, step)
            G_C = G + (first + step) * g_j
            G_W = tl.load(G_C + column_W * g_c, mask=real_W & (place_W > step), other=0.0)
            G_GW = tl.load(G_C + column_GW * g_c, mask=real_GW & (group_G > group)[:, None], other=0.0)
            V_WR -= G_W[:, None] * r_R[None, :]
            V_GWR -= G_GW[:, :, None] * r_R[None, None, :]
        tl.store(V + column_W[:, None] * v_b + (row_R * v_r)[None, :], V_WR, mask=real_WR)


@triton.jit
def _at(X_WR: tl.tensor, place_W: tl.tensor, place: tl.tensor) -> tl.tensor:
    """X at one place [R]."""
    return tl.sum(tl.where((place_W == place)[:, None], X_WR, 0.0), 0)


@triton.jit
def _best(scores_WR: tl.tensor, place_W: tl.tensor, n: tl.constexpr, m: tl.constexpr) -> tl.tensor:
    """The mask of the n best of m places [W, R]: those that at least m − n others go before."""
    before_WR = tl.zeros(scores_WR.shape, tl.int32)
    for place in range(m):
        score_1R = _at(scores_WR, place_W, place)[None, :]
        before_WR += tl.where(place_W[:, None] > place, score_1R <= scores_WR, score_1R < scores_WR).to(tl.int32)
    return before_WR >= m - n
