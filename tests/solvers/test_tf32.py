"""TF32 keeps 11 leading bits of what it multiplies. ADMM's search runs in it on a GPU; here its products are rounded by
hand, wherever the code asks a GPU for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from obsprune.core.patterns import NofM, Pattern, Unstructured
from obsprune.core.products import quick_product
from obsprune.core.statistics import Gram
from obsprune.solvers import admm, build
from obsprune.solvers.base import Solution

LAYERS = ["blocks.4.mlp.fc1", "blocks.7.mlp.fc2"]
PATTERNS = [Unstructured(0.5), Unstructured(0.7), NofM(2, 4)]
WITHIN = 1e-3
MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


def tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits behind the first one, halves away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Rounding(TorchDispatchMode):
    """Products of float32 while they are asked for in TF32; counts them and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = self.plain = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (MM, ADDMM) and torch.backends.cuda.matmul.fp32_precision == "tf32":
            self.rounded += 1
            args = (*args[:-2], tf32(args[-2]), tf32(args[-1]))
        elif function in (MM, ADDMM):
            self.plain += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rounding]:
    """ADMM takes the GPU's way, whose products in TF32 are rounded."""
    with monkeypatch.context() as patch, Rounding() as rounding:
        patch.setattr(admm, "_whole", admm._differing)
        yield rounding


@pytest.fixture(scope="module")
def layers(oracles: Path) -> dict[str, Tensor]:
    return load_file(oracles / "deit-layers-sparsegpt.safetensors")


def solved(W_RC: Tensor, H_CC: Tensor, pattern: Pattern) -> Solution:
    solver = build("admm", {})
    return solver.solve(W_RC, solver.prepare(Gram.of(H_CC, 1)), pattern)


def far(one: Solution, other: Solution) -> float:
    return abs(one.loss / other.loss - 1)


def ill_conditioned() -> tuple[Tensor, Tensor]:
    """A layer whose inputs have large means and a spectrum over six orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    B_CC = torch.randn(256, 256, generator=generator) * torch.logspace(0, -3, 256)[:, None]
    mean_C = 3 * torch.randn(256, generator=generator) * B_CC.square().sum(0).sqrt()
    x_TC = torch.randn(2000, 256, generator=generator) @ B_CC + mean_C
    return torch.randn(128, 256, generator=generator) / 16, x_TC.T @ x_TC


def test_rounding_keeps_eleven_bits() -> None:
    x = torch.tensor([1 + 2**-11, -(1 + 2**-11), 1 + 2**-12, 3.0, 0.0])
    assert tf32(x).tolist() == [1 + 2**-10, -(1 + 2**-10), 1.0, 3.0, 0.0]
    A = torch.full((2, 2), 1 + 2**-11)
    with Rounding() as rounding:
        assert not torch.equal(quick_product(A, A), A @ A)
    assert (rounding.rounded, rounding.plain) == (1, 1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_search_in_tf32_is_as_good(
    layers: dict[str, Tensor], layer: str, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    W_RC, H_CC = layers[f"{layer}/W"], layers[f"{layer}/H"]
    plain = solved(W_RC, H_CC, pattern)
    with as_on_a_gpu(monkeypatch) as rounding:
        quick = solved(W_RC, H_CC, pattern)
    assert far(quick, plain) < WITHIN
    assert rounding.rounded >= 30  # the search
    assert rounding.plain > 20  # the weights on the final mask, in float32
    assert int((~quick.keep).sum()) == int((~plain.keep).sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_an_ill_conditioned_layer_gets_the_mask_of_float64(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for half a percent of it; in TF32 the other form, which has to cancel, differs by 3 to 6 percent."""
    W_RC, H_CC = ill_conditioned()
    exact = solved(W_RC.double(), H_CC.double(), pattern)
    with as_on_a_gpu(monkeypatch):
        quick = solved(W_RC, H_CC, pattern)
    assert float((quick.keep != exact.keep).float().mean()) < 0.005
    assert quick.loss < 1.02 * exact.loss
