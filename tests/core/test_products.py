"""Sums of narrow inputs lose nothing: what a GPU does, done by hand on a CPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from obsprune.core import products
from obsprune.core.products import add_cross, add_gram, add_half, add_narrow, matmul_settings, narrowed, pieces
from obsprune.core.statistics import Cross, Gram

NARROW = pytest.mark.parametrize("dtype", products.NARROW, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [*products.NARROW, torch.float32], ids=str)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def inputs(tokens: int = 1000, columns: int = 24, seed: int = 0) -> Tensor:
    """With a mean far from 0 the sums grow, as those of activations do."""
    return 2 + torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def exact(y_TR: Tensor, x_TC: Tensor) -> Tensor:
    return y_TR.double().T @ x_TC.double()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


@pytest.fixture
def on_paper(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The GPU's product as a CPU can do it, on parts that are small; the dtypes it was given."""
    seen: list[torch.dtype] = []

    def product(y_TB: Tensor, x_TC: Tensor, dtype: torch.dtype) -> Tensor:
        assert y_TB.dtype == x_TC.dtype
        seen.append(x_TC.dtype)
        return y_TB.to(dtype).T @ x_TC.to(dtype)

    monkeypatch.setattr(products, "product", product)
    monkeypatch.setattr(products, "PART", 7)
    return seen


@DTYPES
@pytest.mark.parametrize("columns", [5, 7, 24])
def test_half_a_square_and_its_mirror_are_all_of_it(
    on_paper: list[torch.dtype], dtype: torch.dtype, columns: int
) -> None:
    x_TC, H_CC = inputs(columns=columns).to(dtype), torch.ones(columns, columns)
    add_half(H_CC, x_TC)
    assert set(on_paper) == {dtype}
    assert distance(H_CC - 1, exact(x_TC, x_TC)) < 2e-6
    assert distance(H_CC, H_CC.T.double()) < 1e-6


@NARROW
def test_a_wide_factor_beside_a_narrow_one(on_paper: list[torch.dtype], dtype: torch.dtype) -> None:
    x_TC, y_TR = inputs().to(dtype), 0.3 * (inputs(columns=10, seed=1) - 2)
    K_RC = torch.zeros(10, 24)
    add_narrow(K_RC, y_TR, x_TC)
    assert set(on_paper) == {dtype}
    assert distance(K_RC, exact(y_TR, x_TC)) < (2e-5 if dtype == torch.bfloat16 else 2e-6)
    assert distance(y_TR.to(dtype).double().T @ x_TC.double(), exact(y_TR, x_TC)) > 4e-5  # what one part would lose


@NARROW
def test_both_factors_narrow(on_paper: list[torch.dtype], dtype: torch.dtype) -> None:
    x_TC, y_TR, K_RC = inputs().to(dtype), inputs(columns=10, seed=1).to(dtype), torch.zeros(10, 24)
    add_narrow(K_RC, y_TR, x_TC)
    assert distance(K_RC, exact(y_TR, x_TC)) < 2e-6
    assert len(on_paper) == 2  # two parts of rows, none of them twice


@pytest.mark.parametrize("scale", [0.0, 1e-28, 1e-6, 1.0, 1e6, 1e37], ids=str)
def test_narrowing_suits_all_sizes(scale: float) -> None:
    y_TB = scale * torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    pairs = narrowed(y_TB, torch.float16)
    assert all(part.dtype == torch.float16 and bool(part.isfinite().all()) for part, _ in pairs)
    whole = sum((part.double() * unit.double() for part, unit in pairs), torch.zeros(1))
    assert float((whole - y_TB.double()).abs().max()) <= 2**-22 * float(y_TB.abs().max())


def test_pieces_are_cast_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TC, y_TR = inputs().bfloat16(), inputs(columns=10).bfloat16()
    ((whole,),) = pieces(torch.bfloat16, x_TC)
    assert whole is x_TC
    monkeypatch.setattr(products, "PIECE_BYTES", 4 * 24 * 300)
    parts = list(pieces(torch.float32, y_TR, x_TC))
    assert [[len(part) for part in both] for both in parts] == [[300, 300]] * 3 + [[100, 100]]
    assert all(part.dtype == torch.float32 for both in parts for part in both)
    H_CC, sum_C, K_RC = torch.zeros(24, 24), torch.zeros(24), torch.zeros(10, 24)
    add_gram(H_CC, sum_C, x_TC)
    add_cross(K_RC, y_TR, x_TC)
    assert distance(H_CC, exact(x_TC, x_TC)) < 2e-6
    assert distance(sum_C, x_TC.double().sum(0)) < 2e-6
    assert distance(K_RC, exact(y_TR, x_TC)) < 2e-6


def test_float32_on_a_cpu_is_one_product() -> None:
    x_TC, y_TR = inputs(), inputs(columns=10, seed=1)
    gram, cross = Gram(24), Cross(10, 24)
    for part_TC, part_TR in zip(x_TC.split(130), y_TR.split(130), strict=True):
        gram.add(part_TC)
        cross.add(part_TR, part_TC)
    H_CC, sum_C, K_RC = torch.zeros(24, 24), torch.zeros(24), torch.zeros(10, 24)
    for part_TC, part_TR in zip(x_TC.split(130), y_TR.split(130), strict=True):
        H_CC.addmm_(part_TC.T, part_TC)
        sum_C += part_TC.sum(0)
        K_RC.addmm_(part_TR.T, part_TC)
    assert torch.equal(gram.H_CC, H_CC) and torch.equal(gram.sum_C, sum_C) and torch.equal(cross.K_RC, K_RC)


@DTYPES
def test_no_tokens_add_nothing(dtype: torch.dtype) -> None:
    gram, cross = Gram(24), Cross(10, 24)
    gram.add(inputs(0).to(dtype))
    cross.add(inputs(0, 10), inputs(0).to(dtype))
    assert not gram.H_CC.any() and not cross.K_RC.any() and gram.count == cross.count == 0


def test_settings_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision, settings.allow_fp16_accumulation
    with pytest.raises(ZeroDivisionError), matmul_settings(fp32_precision="tf32", allow_fp16_accumulation=True):
        assert (settings.fp32_precision, settings.allow_fp16_accumulation) == ("tf32", True)
        raise ZeroDivisionError
    assert (settings.fp32_precision, settings.allow_fp16_accumulation) == before


def on_gpu(work: Callable[[], None]) -> int:
    """Bytes that the work held at most, beside what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@gpu
@DTYPES
def test_on_a_gpu_sums_are_right_and_nothing_is_cast(dtype: torch.dtype) -> None:
    tokens, columns = 20_000, 2304  # two parts, the second one short
    x_TC = inputs(tokens, columns).to("cuda", dtype)
    gram = Gram(columns, device="cuda")
    gram.add(x_TC[:1])  # cuBLAS takes its workspace
    held = on_gpu(lambda: gram.add(x_TC[1:]))
    true = exact(x_TC, x_TC)
    error = distance(gram.H_CC, true)
    diagonal = float((gram.H_CC.double().diagonal() / true.diagonal() - 1).abs().max())
    print(f"{dtype}: H {error:.1e}, diagonal {diagonal:.1e}, {held / 2**20:.0f} MiB")
    assert error < 2e-5 and diagonal < 1e-4
    assert distance(gram.sum_C, x_TC.double().sum(0)) < 2e-6
    assert held < tokens * columns * 2  # half of one float32 copy


@pytest.mark.gpu
@gpu
@NARROW
def test_on_a_gpu_crosses_are_right(dtype: torch.dtype) -> None:
    x_TC = inputs(20_000, 512).to("cuda", dtype)
    wide_TR = 0.1 * inputs(20_000, 2304, seed=1).to("cuda")
    for y_TR in (wide_TR, wide_TR.to(dtype)):
        cross = Cross(2304, 512, "cuda")
        cross.add(y_TR, x_TC)
        assert distance(cross.K_RC, exact(y_TR, x_TC)) < 5e-5


@pytest.mark.gpu
@gpu
def test_on_a_gpu_fp16_is_never_summed_in_fp16() -> None:
    x_TC = inputs(20_000, 64).to("cuda", torch.float16)
    with matmul_settings(allow_fp16_accumulation=True):
        gram = Gram(64, device="cuda")
        gram.add(x_TC)
        assert torch.backends.cuda.matmul.allow_fp16_accumulation
    assert distance(gram.H_CC, exact(x_TC, x_TC)) < 2e-5


@pytest.mark.gpu
@gpu
@DTYPES
def test_on_a_gpu_order_and_size_of_batches_change_only_rounding(dtype: torch.dtype) -> None:
    x_TC = inputs(4096, 300).to("cuda", dtype)
    sums = []
    for batches in (x_TC.split(4096), x_TC.split(130), x_TC.split(130)[::-1]):
        gram = Gram(300, device="cuda")
        for batch in batches:
            gram.add(batch)
        sums.append(gram.H_CC)
    assert all(distance(other, sums[0].double()) < 2e-5 for other in sums[1:])
