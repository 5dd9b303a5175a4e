from __future__ import annotations

import pytest
import torch

from obsprune.core.lora import merge_lora
from obsprune.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_is_added_where_the_weight_is_not_zero(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    W, B, A = (torch.randn(*shape, generator=generator) for shape in ((6, 10), (6, 2), (2, 10)))
    zero = torch.rand(6, 10, generator=generator) < 0.5
    sparse = W.masked_fill(zero, 0).to(dtype)
    merged = merge_lora(sparse, B, A, 0.25)
    assert merged.dtype == dtype
    assert (merged[zero] == 0).all() and (merged[~zero] != sparse[~zero]).all()
    expected = sparse.double() + 0.25 * B.double() @ A.double()
    torch.testing.assert_close(merged.double()[~zero], expected[~zero], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(sparse, W.masked_fill(zero, 0).to(dtype))  # the weight itself is as it was


def test_an_adapter_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(6, 10\).*\[rank, 10\].*\(6, 2\) and \(10, 2\)"):
        merge_lora(torch.zeros(6, 10), torch.zeros(6, 2), torch.zeros(10, 2), 1.0)
