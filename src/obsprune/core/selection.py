"""The k-th lowest of many numbers, exactly and without a sort: leading bits are counted, then one bin is searched.

The bits of a float, read as an integer, are in the order of the numbers (of the negative ones, in the reverse). Numbers
that have 16 leading bits in common differ by less than a hundredth (float32), so that a bin holds few of them, but for
the same number many times over.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = 2**15
"""Bins of the numbers of one sign."""
INTEGERS = {4: torch.int32, 8: torch.int64}
"""By the bytes of a float."""


def kth_lowest(x: Tensor, k: int) -> Tensor:
    """The k-th lowest number of `x` (any shape, 1 ≤ k ≤ how many it has), as a tensor without dimensions; no NaN."""
    x_N = _flat(x).to(torch.promote_types(x.dtype, torch.float32))
    bin_N = x_N.view(INTEGERS[x_N.itemsize]) >> (8 * x_N.itemsize - 16) & 2 * HALF - 1
    counts = torch.bincount(bin_N, minlength=2 * HALF)
    upto = torch.cat([counts[HALF:].flip(0), counts[:HALF]]).cumsum(0)  # negative numbers first, the lowest before all
    place = int(torch.searchsorted(upto, k))
    chosen = place - HALF if place >= HALF else 2 * HALF - 1 - place
    value: Tensor = x_N[bin_N == chosen].kthvalue(k - int(upto[place] - counts[chosen])).values
    return value.to(x.dtype)


def _flat(x: Tensor) -> Tensor:
    """All numbers in any order: a copy only where neither rows nor columns lie in a row."""
    return (x.T if x.dim() == 2 and x.T.is_contiguous() else x).reshape(-1)
