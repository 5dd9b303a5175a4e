"""Products of tall matrices, yᵀx summed over tokens, and of wide ones, each in the precision that it needs.

On a GPU bf16 and fp16 go to the tensor cores as they are and come back as float32 sums: no activation is cast, and no
sum is cut. A CPU has no such product: there tokens are cast, some at a time.

Legend: x_TC, y_TR inputs (T tokens, P of one piece); H_CC = Σ x xᵀ; K_RC = Σ y xᵀ; B rows of a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
PIECE_BYTES = 2**27
"""Of tokens that are cast at a time."""
PART = 2048
"""Rows of a sum that a GPU makes at a time."""
TOP, LEAST = 15, -100
"""Powers of two: fp16 ends at the next one; smaller numbers are as good as zero."""


@contextmanager
def matmul_settings(**values: Any) -> Iterator[None]:
    """While open, torch.backends.cuda.matmul has these values. Products on a CPU know none of them."""
    settings = torch.backends.cuda.matmul
    before = {name: getattr(settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def quick_product(A_RC: Tensor, B_CC: Tensor) -> Tensor:
    """A B in the dtype of both, of which a GPU multiplies 11 leading bits (TF32): for searches, whose answer is judged
    otherwise.
    """
    with matmul_settings(fp32_precision="tf32"):
        return A_RC @ B_CC


def on_tensor_cores(x_TC: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of these numbers are summed in `dtype` without a cast."""
    return x_TC.is_cuda and x_TC.dtype in NARROW and dtype == torch.float32


def pieces(dtype: torch.dtype, *tensors_T: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in `dtype`: whole where they are in it, else in parts of the same tokens, cast as they are used."""
    if all(x.dtype == dtype for x in tensors_T):
        yield tensors_T
        return
    tokens = max(1, PIECE_BYTES // (dtype.itemsize * max(1, *(x.shape[1] for x in tensors_T))))
    for parts in zip(*(torch.split(x, tokens) for x in tensors_T), strict=True):
        yield tuple(x.to(dtype) for x in parts)


def add_gram(H_CC: Tensor, sum_C: Tensor, x_TC: Tensor) -> None:
    """H += xᵀx, and sum += Σ x, in their dtype."""
    whole = on_tensor_cores(x_TC, H_CC.dtype)
    for (x_PC,) in [(x_TC,)] if whole else pieces(H_CC.dtype, x_TC):
        add_square(H_CC, x_PC)
        sum_C += x_PC.sum(0, dtype=sum_C.dtype)


def add_square(H_CC: Tensor, x_PC: Tensor) -> None:
    """H += xᵀx: all of it in one product, but on a GPU, where half of it is worth more than one product."""
    if H_CC.is_cuda:
        add_half(H_CC, x_PC)
    else:
        H_CC.addmm_(x_PC.T, x_PC)


def add_half(H_CC: Tensor, x_PC: Tensor) -> None:
    """H += xᵀx, by rows of PART: up to the diagonal, and what that mirrors."""
    for start in range(0, len(H_CC), PART):
        stop = start + PART
        left_BC = product(x_PC[:, start:stop], x_PC[:, :stop], H_CC.dtype)
        H_CC[start:stop, :stop] += left_BC
        H_CC[:start, start:stop] += left_BC[:, :start].T


def add_cross(K_RC: Tensor, y_TR: Tensor, x_TC: Tensor) -> None:
    """K += yᵀx, in K's dtype."""
    if on_tensor_cores(x_TC, K_RC.dtype) and len(x_TC):
        add_narrow(K_RC, y_TR, x_TC)
        return
    for y_PR, x_PC in pieces(K_RC.dtype, y_TR, x_TC):
        K_RC.addmm_(y_PR.T, x_PC)


def add_narrow(K_RC: Tensor, y_TR: Tensor, x_TC: Tensor) -> None:
    """K += yᵀx with x as narrow as it is; a wider y becomes the sum of two narrow ones."""
    for start in range(0, len(K_RC), PART):
        rows = slice(start, start + PART)
        for y_TB, unit in narrowed(y_TR[:, rows], x_TC.dtype):
            K_RC[rows].addcmul_(product(y_TB, x_TC, K_RC.dtype), unit)


def narrowed(y_TB: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Pairs (narrow, unit) whose products add up to y: to 2⁻²² of each number (or 2⁻⁴⁰ of the largest) in fp16, to 2⁻¹⁶
    in bf16. The unit is a power of two that makes the most of fp16's range, and that the host need not know.
    """
    one = torch.ones((), device=y_TB.device)
    if y_TB.dtype == dtype:
        return [(y_TB, one)]
    y_TB = y_TB.float()
    exponent = torch.frexp(y_TB.abs().amax()).exponent.clamp_min(LEAST) - TOP
    scaled_TB = torch.ldexp(y_TB, -exponent)
    high_TB = scaled_TB.to(dtype)
    unit = torch.ldexp(one, exponent)
    return [(high_TB, unit), ((scaled_TB - high_TB).to(dtype), unit)]


def product(y_TB: Tensor, x_TC: Tensor, dtype: torch.dtype) -> Tensor:
    """yᵀx [B, C] of two tensors of one dtype on a GPU, summed in `dtype`.

    cuBLAS may reduce in the dtype of its answer, which is the wider one here; to sum fp16 in fp16 is forbidden to it.
    """
    if x_TC.dtype == dtype:
        return y_TB.T @ x_TC
    with matmul_settings(allow_fp16_accumulation=False):
        return torch.mm(y_TB.T, x_TC, out_dtype=dtype)
