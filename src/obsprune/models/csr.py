"""Linear layers whose weight is held as CSR: the numbers that are not zero, and their columns in 32 bits.

On CPUs MKL then is faster than a dense product where about four of five weights, or more, are zero (docs/inference.md).
Indices of 64 bits, torch's default, are converted at each product and take twice the room.
"""

from __future__ import annotations

import sys
from typing import Self, final

import torch
from torch import Tensor, nn

from obsprune.errors import InputError

DTYPES = (torch.float32, torch.float64)
"""Those in which MKL multiplies."""
TOKENS, NUMBERS = 32, 2**15
"""At least so many tokens are multiplied at once, and more while they have no more than so many numbers together: these
then stay in the cache. With thousands of tokens that is up to three times as fast as all at once.
"""


@final
class CsrLinear(nn.Module):
    """y = x Wᵀ + b with a sparse W [out, in]; x: [..., in], dense. For inference, on CPUs."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Linear) -> Self:
        """The same layer with a weight in CSR; the bias is shared."""
        return cls(to_csr(layer.weight), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y_TR = product(self.weight, x.reshape(-1, self.in_features))
        y = y_TR.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def to_csr(weight: Tensor) -> Tensor:
    """A matrix in CSR with indices of 32 bits."""
    wide = weight.detach().to_sparse_csr()
    rows, columns = wide.crow_indices().int(), wide.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, wide.values(), wide.shape, check_invariants=False)


def product(weight_RC: Tensor, x_TC: Tensor) -> Tensor:
    """x Wᵀ. MKL is several times faster with tokens as columns, and twice as fast with one token as a vector."""
    if len(x_TC) == 1:
        return torch.mv(weight_RC, x_TC[0])[None]
    parts = torch.split(x_TC, max(TOKENS, NUMBERS // x_TC.shape[1]))
    return torch.cat([torch.mm(weight_RC, part_TC.T.contiguous()).T for part_TC in parts])


def require_csr(weight: Tensor) -> None:
    """Raises InputError where torch cannot multiply by such a weight in CSR, or not by MKL."""
    if weight.device.type != "cpu":
        raise InputError(f"it is for CPUs, and the weights are on {weight.device}")
    if not torch.backends.mkl.is_available() or sys.platform != "linux":  # type: ignore[no-untyped-call]
        # torch calls the sparse part of MKL on Linux alone
        raise InputError(f"torch {torch.__version__} on {sys.platform} has no MKL to multiply CSR by")
    if weight.dtype not in DTYPES:
        raise InputError(
            f"torch multiplies CSR in float32 and float64 alone, not in {str(weight.dtype).removeprefix('torch.')}; "
            "--dtype float32"
        )
