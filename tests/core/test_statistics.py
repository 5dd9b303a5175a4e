from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obsprune.core.statistics import Cross, Gram


def inputs(tokens: int = 1000, columns: int = 24) -> Tensor:
    # A mean far from 0 makes the sum grow, as activations do: a low-precision accumulator would show.
    return 2 + torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))


def summed(*batches: Tensor) -> Gram:
    gram = Gram(batches[0].shape[1])
    for batch in batches:
        gram.add(batch)
    return gram


def exact(x_TC: Tensor) -> Tensor:
    return x_TC.double().T @ x_TC.double()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_batch_size_does_not_matter(size: int) -> None:
    x_TC = inputs()
    gram = summed(*x_TC.split(size))
    assert distance(gram.H_CC, exact(x_TC)) < 2e-6
    assert gram.count == 1000


def test_batch_order_does_not_matter() -> None:
    batches = inputs().split(130)
    forward, backward = summed(*batches), summed(*reversed(batches))
    assert distance(forward.H_CC, backward.H_CC.double()) < 2e-6
    assert forward.count == backward.count == 1000


def test_sums_of_ranks_add_up() -> None:
    x_TC = inputs()
    one, other = summed(x_TC[:333]), summed(x_TC[333:])
    assert distance(one.tensors()["H"] + other.tensors()["H"], exact(x_TC)) < 2e-6
    assert one.count + other.count == 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    x_TC = inputs().to(dtype)
    gram = summed(*x_TC.split(50))
    assert gram.H_CC.dtype == torch.float32
    assert distance(gram.H_CC, exact(x_TC)) < 2e-6  # against the rounded inputs: only the sum is judged


def test_the_inputs_are_not_changed() -> None:
    x_TC = inputs()
    summed(x_TC)
    assert torch.equal(x_TC, inputs())


def test_tensors_are_the_sums_themselves() -> None:
    gram = summed(inputs())
    gram.tensors()["H"].mul_(3)  # as an all-reduce does
    assert distance(gram.H_CC, 3 * exact(inputs())) < 2e-6


def test_double_keeps_sum_count_and_name_and_goes_on_in_float64() -> None:
    gram = Gram(24, "blocks.1.fc2")
    gram.add(inputs())
    double = gram.double()
    assert (double.H_CC.dtype, double.count, double.name) == (torch.float64, 1000, "blocks.1.fc2")
    assert torch.equal(double.H_CC, gram.H_CC.double())
    before = double.H_CC.clone()
    double.add(inputs())
    assert distance(double.H_CC - before, exact(inputs())) < 1e-12


def test_of_wraps_a_sum_made_elsewhere() -> None:
    H_CC = exact(inputs())
    gram = Gram.of(H_CC, 5, "elsewhere")
    assert gram.H_CC is H_CC
    assert (gram.count, gram.name) == (5, "elsewhere")


def test_cross_is_a_sum_over_tokens() -> None:
    torch.manual_seed(0)
    y_TR, x_TC = torch.randn(40, 3), torch.randn(40, 5)
    whole, parts = Cross(3, 5), Cross(3, 5)
    whole.add(y_TR, x_TC)
    for y, x in zip(y_TR.split(7), x_TC.split(7), strict=True):
        parts.add(y, x)
    assert whole.count == parts.count == 40
    torch.testing.assert_close(whole.K_RC, y_TR.T @ x_TC)
    torch.testing.assert_close(parts.tensors()["K"], whole.K_RC)
    bf16 = Cross(3, 5)
    bf16.add(y_TR.bfloat16(), x_TC.bfloat16())
    assert bf16.K_RC.dtype == torch.float32
