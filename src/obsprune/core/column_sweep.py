"""The sweep over one tile of SparseGPT's columns, in as few and as large operations as its order allows.

Legend: B columns of the tile, each a row of memory; R rows of the layer; V_BR, G_BB as in solvers/sparsegpt.py:
V_c −= Σ_{j<c} G_jc V_j over the j that go, one column after the other; goes_BR 1 where a weight goes, 0 where it stays;
gone_BR = goes ∘ V; M columns that are judged together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Choose = Callable[[Tensor, slice], Tensor]
PARTS = (32, 8)
"""Columns of a part, and of a part of it, to which all columns before them are added in one matrix product."""


def sweep(V_BR: Tensor, G_BB: Tensor, keep_BR: Tensor) -> None:
    """Brings V to its final values, in place, for a mask that is known."""
    gone_BR, goes_BR = torch.empty_like(V_BR), (~keep_BR).to(V_BR.dtype)

    def settle(columns: slice) -> None:
        torch.mul(V_BR[columns], goes_BR[columns], out=gone_BR[columns])

    _Tile(V_BR, G_BB, gone_BR, settle)(0, len(V_BR), [*PARTS, 1])


def sweep_groups(V_BR: Tensor, G_BB: Tensor, choose: Choose, m: int, most: int) -> Tensor:
    """The same for a mask that is chosen m columns at a time, on reaching them; returns keep_BR.

    choose(V_MR, columns): their keep_MR by V as it is if all of the group stay. most: how many of a group go at most.
    """
    gone_BR, goes_BR, after_BB = torch.empty_like(V_BR), torch.empty_like(V_BR), G_BB.triu(1).T

    def settle(columns: slice) -> None:
        V_MR, gone_MR, goes_MR = V_BR[columns], gone_BR[columns], goes_BR[columns]
        G_MM = after_BB[columns, columns]
        torch.logical_not(choose(V_MR, columns), out=goes_MR)
        torch.mul(V_MR, goes_MR, out=gone_MR)
        for _ in range(most - 1):  # the first that goes is right at once, each turn makes the next one right
            torch.mul(torch.addmm(V_MR, G_MM, gone_MR, alpha=-1), goes_MR, out=gone_MR)
        V_MR.addmm_(G_MM, gone_MR, alpha=-1)

    _Tile(V_BR, G_BB, gone_BR, settle)(0, len(V_BR), [*(part // m * m for part in PARTS if part > m), m])
    return goes_BR == 0


@dataclass(frozen=True)
class _Tile:
    """settle(columns): fills `gone` for the columns of a part that is not divided further, V of which is known but for
    what they do to each other.
    """

    V_BR: Tensor
    G_BB: Tensor
    gone_BR: Tensor
    settle: Callable[[slice], None]

    def __call__(self, start: int, stop: int, widths: list[int]) -> None:
        """Columns start…stop, to whose V all before `start` are added, in parts of the first of `widths`.

        A part is told of the columns since `start` when it is reached, and goes on in finer parts by itself: sums as
        in one step a column, but nearly all in matrix products.
        """
        width, *finer = widths
        for first in range(start, stop, width):
            part = slice(first, min(first + width, stop))
            if first > start:
                self.V_BR[part].addmm_(self.G_BB[start:first, part].T, self.gone_BR[start:first], alpha=-1)
            if finer:
                self(part.start, part.stop, finer)
            else:
                self.settle(part)
