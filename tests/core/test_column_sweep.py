"""The blocked sweep against the loop it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obsprune.core.column_sweep import sweep, sweep_groups


def one_by_one(V_BR: Tensor, G_BB: Tensor, keep_BR: Tensor) -> Tensor:
    """V_c −= Σ_{j<c} G_jc V_j over the j that go."""
    V_BR = V_BR.clone()
    for j in range(len(V_BR)):
        for c in range(j + 1, len(V_BR)):
            V_BR[c] -= G_BB[j, c] * V_BR[j] * ~keep_BR[j]
    return V_BR


def tile(columns: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, a factor whose lower part must not be read, a mask."""
    generator = torch.Generator().manual_seed(100 * columns + rows)
    G_BB = 0.3 * torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    G_BB += torch.full_like(G_BB, 1e9).tril(-1) + torch.eye(columns, dtype=torch.float64)
    V_BR = torch.randn(columns, rows, generator=generator, dtype=torch.float64)
    return V_BR, G_BB, torch.rand(columns, rows, generator=generator) > 0.5


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 71, 128])
def test_a_known_mask(columns: int, rows: int) -> None:
    V_BR, G_BB, keep_BR = tile(columns, rows)
    expected_BR = one_by_one(V_BR, G_BB, keep_BR)
    sweep(V_BR, G_BB, keep_BR)
    assert torch.allclose(V_BR, expected_BR, rtol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (0, 4), (4, 4), (3, 5), (16, 32), (1, 2)])
@pytest.mark.parametrize("groups", [1, 3, 11])
def test_a_mask_chosen_group_by_group(n: int, m: int, groups: int) -> None:
    V_BR, G_BB, _ = tile(groups * m, 9)
    start_BR, seen = V_BR.clone(), list[Tensor]()

    def choose(V_MR: Tensor, columns: slice) -> Tensor:
        seen.append(V_MR.clone())
        assert (columns.start, columns.stop) == (m * (len(seen) - 1), m * len(seen))
        return V_MR.abs().argsort(dim=0).argsort(dim=0) >= m - n

    keep_BR = sweep_groups(V_BR, G_BB, choose, m, m - n)
    assert torch.allclose(V_BR, one_by_one(start_BR, G_BB, keep_BR), rtol=1e-9)
    assert bool((keep_BR.unflatten(0, (-1, m)).sum(1) == n).all())
    for group, V_MR in enumerate(seen):  # what a group was judged by: all before it are swept, none of itself
        alone_BR = keep_BR.clone()
        alone_BR[group * m :] = True
        assert torch.allclose(V_MR, one_by_one(start_BR, G_BB, alone_BR)[group * m : (group + 1) * m], rtol=1e-9)
