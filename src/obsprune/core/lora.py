"""Low-rank adapters, added to a sparse weight.

Legend: W the weight [R, C], B [R, r] and A [r, C] the adapter of rank r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obsprune.errors import InputError


def merge_lora(W_RC: Tensor, B_Rr: Tensor, A_rC: Tensor, scale: float) -> Tensor:
    """W + scale·B·A (Hu et al. 2021, section 4.1) where W is not zero, and exactly zero where it is.

    Computed in float32 or, where W is wider, as W; returned in W's dtype. scale: the adapter's alpha over its rank.
    Raises InputError when the shapes do not fit.
    """
    (rows, rank), (rank_A, columns) = B_Rr.shape, A_rC.shape
    if rank != rank_A or W_RC.shape != (rows, columns):
        raise InputError(
            f"a weight {tuple(W_RC.shape)} takes B [{W_RC.shape[0]}, rank] and A [rank, {W_RC.shape[1]}], and these "
            f"are {tuple(B_Rr.shape)} and {tuple(A_rC.shape)}"
        )
    wide = torch.promote_types(W_RC.dtype, torch.float32)
    merged = torch.addmm(W_RC.to(wide), B_Rr.to(wide), A_rC.to(wide), alpha=scale)
    return merged.to(W_RC.dtype).masked_fill_(W_RC == 0, 0)
