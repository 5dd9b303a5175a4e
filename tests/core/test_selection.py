from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obsprune.core.selection import kth_lowest

thorough = settings(derandomize=True, deadline=None, database=None, max_examples=300)
SPREAD = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)).exp()
NUMBERS = {
    "spread": SPREAD,
    "negative": -SPREAD,
    "both signs": SPREAD - 1,
    "one bin": 1 + 1e-4 * SPREAD.clamp(max=5),
    "many equal": SPREAD.round(),
    "all equal": torch.zeros(40, 30),
    "zeros of both signs": torch.tensor([0.0, -0.0, 1.0, -1.0, -0.0, 0.0]),
    "infinite": torch.tensor([torch.inf, -torch.inf, 0.0, 3.0, -3.0, -torch.inf]),
    "subnormal": torch.tensor([1e-45, 0.0, -1e-45, 3e-42, -2e-40]),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("label", NUMBERS)
def test_it_is_what_a_sort_says(label: str, dtype: torch.dtype) -> None:
    numbers = NUMBERS[label].to(dtype)
    in_order = numbers.flatten().sort().values
    for k in {1, 2, len(in_order) // 3, len(in_order) // 2, len(in_order) - 1, len(in_order)}:
        assert float(kth_lowest(numbers, k)) == float(in_order[k - 1])


@thorough
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50), st.data())
def test_of_any_numbers(numbers: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(numbers)))
    assert float(kth_lowest(torch.tensor(numbers), k)) == sorted(numbers)[k - 1]


def test_rows_columns_and_steps_are_read_where_they_lie() -> None:
    expected = float(SPREAD.flatten().sort().values[999])
    assert float(kth_lowest(SPREAD.T, 1000)) == expected
    assert float(kth_lowest(SPREAD.repeat_interleave(2, 1)[:, ::2], 1000)) == expected
