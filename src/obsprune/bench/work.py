"""The least that a computation takes: flops by number format, bytes by way.

Legend: T tokens, C inputs, R outputs of a matrix. A product of [a, b] and [b, c] takes 2abc flops.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

MEMORY, READ, WRITTEN, SENT = "memory", "file read", "file written", "to the device"
"""The ways of bytes."""
TF32 = "tf32"
"""float32 whose factors are rounded to 10 bits in a product, as NVIDIA's tensor cores have it."""


@final
@dataclass
class Work:
    """flops: by the format they are done in (float32, bfloat16, …); moved: bytes by way."""

    flops: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)

    def add(self, other: Work) -> None:
        """Both together."""
        self.flops.update(other.flops)
        self.moved.update(other.moved)

    def limit(self, rates: Mapping[str, float]) -> float:
        """Seconds it takes at least where nothing is faster than `rates` (flops/s by format, bytes/s by way; what has
        none takes no time), products and ways run side by side, and formats one after the other.
        """
        products = sum(count / rates.get(unit, math.inf) for unit, count in self.flops.items())
        return max([products, *(count / rates.get(way, math.inf) for way, count in self.moved.items())])


def unit(x: Tensor) -> str:
    """The format of products of such tensors, as torch is set now."""
    if x.is_cuda and x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return TF32
    return str(x.dtype).removeprefix("torch.")


def touching(flops: float, tensors: Iterable[Tensor], unit: str) -> Work:
    """So many flops, each of the tensors read or written once."""
    return Work(Counter({unit: int(flops)}), Counter({MEMORY: sum(x.nbytes for x in tensors)}))


def gram(H_CC: Tensor, x_TC: Tensor) -> Work:
    """Σ x xᵀ: T C (C + 1), the other half being its mirror. On tensor cores it is done in the format of the inputs, on
    a CPU in that of the sum.
    """
    tokens, columns = x_TC.shape
    return touching(tokens * columns * (columns + 1), [x_TC, H_CC, H_CC], unit(x_TC if x_TC.is_cuda else H_CC))


def cross(K_RC: Tensor, x_TC: Tensor) -> Work:
    """Σ y xᵀ: 2 T R C."""
    flops = 2 * x_TC.shape[0] * K_RC.numel()
    return touching(flops, [x_TC, K_RC, K_RC], unit(x_TC if x_TC.is_cuda else K_RC))


def factor(H_CC: Tensor) -> Work:
    """A Cholesky factorisation: C³ / 3; the Gram is read, its factor written."""
    return touching(len(H_CC) ** 3 / 3, [H_CC, H_CC], unit(H_CC))


def sweep(W_RC: Tensor, H_CC: Tensor) -> Work:
    """SparseGPT on one matrix: every column is moved by all columns before it, R C² / 2 products; weight, answer, mask
    and factor pass the memory once.
    """
    rows, columns = W_RC.shape
    return touching(rows * columns**2, [W_RC, W_RC, W_RC.bool(), H_CC], unit(H_CC))


def file(tensors: Iterable[Tensor], *ways: str) -> Work:
    """Bytes that pass each of some ways."""
    size = sum(x.nbytes for x in tensors)
    return Work(moved=Counter(dict.fromkeys(ways, size)))


# ------------------------------------------------------------------------------------------------ counted in calls


def _product(a: Tensor, b: Tensor, *_: Any) -> float:
    """[…, T, C] by [C, R] or […, C, R]."""
    return 2.0 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _linear(x: Tensor, W_RC: Tensor, *_: Any) -> float:
    return 2.0 * x.numel() * W_RC.shape[0]


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> float:
    """Scores, and their product with the values, the masked ones among them."""
    return 2.0 * q.numel() * k.shape[-2] + 2.0 * q.numel() // q.shape[-1] * k.shape[-2] * v.shape[-1]


CALLS: dict[str, Callable[..., float]] = {
    "linear": _linear,
    "matmul": _product,
    "__matmul__": _product,
    "mm": _product,
    "bmm": _product,
    "addmm": lambda bias, a, b, *_: _product(a, b),
    "addmm_": lambda into, a, b, *_: _product(a, b),
    "baddbmm": lambda bias, a, b, *_: _product(a, b),
    "scaled_dot_product_attention": _attention,
    "linalg_cholesky_ex": lambda A, *_: A.numel() * A.shape[-1] / 3,
    "cholesky_inverse": lambda L, *_: 2 * L.numel() * L.shape[-1] / 3,
    "cholesky_solve": lambda B, L, *_: 2.0 * B.numel() * L.shape[-1],
    "linalg_solve_triangular": lambda A, B, *_: 1.0 * B.numel() * A.shape[-1],
}
"""Flops by the name of torch's function, from its arguments."""


def _convolution(x: Tensor, weight: Tensor, out: Tensor) -> float:
    return 2.0 * out.numel() * weight[0].numel()


def called(name: str, args: Sequence[Any], out: Any) -> Work | None:
    """What a call of torch took; None where it is none of CALLS. With a graph, its way back too: as much again for each
    of the two factors that wants a gradient.
    """
    if name != "conv2d" and name not in CALLS:
        return None
    tensors = [x for x in args if isinstance(x, Tensor)]
    flops = _convolution(args[0], args[1], out) if name == "conv2d" else CALLS[name](*args)
    back = sum(x.requires_grad for x in tensors[-2:]) if torch.is_grad_enabled() else 0
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    return touching((1 + back) * flops, [*tensors, *results], unit(tensors[0]))


@final
class Counted(TorchFunctionMode):
    """While open, `tell` gets the work of every call that is one of CALLS."""

    def __init__(self, tell: Callable[[Work], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        work = called(getattr(func, "__name__", ""), args, out)
        if work is not None:
            self.tell(work)
        return out
