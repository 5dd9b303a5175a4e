"""What a phase must do at least: counted as torch counts it, and by formulas that the solvers' own calls bear out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from obsprune.bench import work
from obsprune.bench.work import Counted, Work
from obsprune.core.patterns import Unstructured
from obsprune.core.products import matmul_settings, quick_product
from obsprune.core.statistics import Cross, Gram
from obsprune.models.kinds import Wish
from obsprune.models.load import Model, load
from obsprune.models.shapes import SHAPES
from obsprune.solvers.admm import ADMM
from obsprune.solvers.sparsegpt import SparseGPT

aten = torch.ops.aten
MORE: dict[Any, Callable[..., int]] = {
    aten.addmm_: lambda into, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1],
    aten.linalg_cholesky_ex: lambda A, out_shape=None, **_: A[0] ** 3 // 3,
    aten.linalg_solve_triangular: lambda A, B, out_shape=None, **_: A[0] * B[0] * B[1],
    aten.cholesky_inverse: lambda L, out_shape=None, **_: 2 * L[0] ** 3 // 3,
}
"""What torch's own counter does not know."""


def by_torch(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter, sdpa_kernel(SDPBackend.MATH):
        run()  # torch does not count a CPU's fused attention
    return int(counter.get_total_flops())


def by_us(run: Callable[[], Any]) -> float:
    done = Work()
    with Counted(done.add):
        run()
    return sum(done.flops.values())


def gram_of(columns: int, tokens: int) -> Gram:
    gram = Gram(columns)
    gram.add(torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)))
    return gram


def opened(name: str, folder: Path) -> tuple[Model, dict[str, Tensor]]:
    dataset = SHAPES[name].tiny(folder)
    model = load(str(folder), device="cpu")
    source, _ = model.open(Wish(dataset, 16))
    return model, model.batches(source.sample(3, torch.Generator().manual_seed(0)).take(range(3)), 3)[0]


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "opt-125m", "phi-1.5", "deit-tiny", "mobilenet-v1"])
def test_a_forward_is_counted_as_torch_counts_it(name: str, tmp_path: Path) -> None:
    model, batch = opened(name, tmp_path)
    with model.loaded():
        found, expected = by_us(lambda: model.network(**batch)), by_torch(lambda: model.network(**batch))
    assert found == pytest.approx(expected, rel=1e-6) and found > 0


def test_the_way_back_too(tmp_path: Path) -> None:
    model, batch = opened("llama-2-7b", tmp_path)

    def there_and_back() -> None:
        model.network(**batch).logits.sum().backward()

    with model.loaded():
        model.network.requires_grad_(True)
        assert by_us(there_and_back) == pytest.approx(by_torch(there_and_back), rel=1e-6)


@pytest.mark.parametrize(("tokens", "columns"), [(300, 64), (50, 96)])
def test_a_gram_takes_half_of_a_whole_product(tokens: int, columns: int) -> None:
    gram, x = Gram(columns), torch.randn(tokens, columns)
    known = work.gram(gram.H_CC, x)
    assert sum(known.flops.values()) == by_torch(lambda: gram.add(x)) * (columns + 1) / (2 * columns)
    assert known.moved == {work.MEMORY: 4 * (tokens * columns + 2 * columns**2)}


def test_a_cross_sum_takes_a_product() -> None:
    cross, y, x = Cross(32, 64), torch.randn(100, 32), torch.randn(100, 64)
    assert sum(work.cross(cross.K_RC, x).flops.values()) == by_torch(lambda: cross.add(y, x))


def test_factor_and_sweep_are_what_sparsegpt_does() -> None:
    solver, gram, W_RC = SparseGPT(), gram_of(1024, 2048), torch.randn(512, 1024)
    known = sum(work.factor(gram.H_CC).flops.values())
    assert by_torch(lambda: solver.prepare(gram)) == pytest.approx(known, rel=0.4)
    state, pattern = solver.prepare(gram), Unstructured(0.5)
    known = sum(work.sweep(W_RC, gram.H_CC).flops.values())
    assert by_torch(lambda: solver.search(W_RC, state, pattern)) == pytest.approx(known, rel=0.4)


def test_admm_is_counted_as_torch_counts_it() -> None:
    gram, W_RC, pattern = gram_of(96, 400), torch.randn(40, 96), Unstructured(0.5)

    def solve() -> None:
        ADMM().search(W_RC, ADMM().prepare(gram), pattern)

    assert by_us(solve) == pytest.approx(by_torch(solve), rel=0.01)


def test_a_limit_is_the_slowest_of_products_and_ways() -> None:
    done = Work(Counter({"float32": 100, "bfloat16": 100}), Counter({"memory": 30}))
    rates = {"float32": 10.0, "bfloat16": 50.0, "memory": 1.0}
    assert done.limit(rates) == 30
    assert done.limit(rates | {"memory": 3.0}) == 12
    assert done.limit({"float32": 10.0}) == 10  # what has no ceiling takes no time
    done.add(Work(moved=Counter({"memory": 70})))
    assert done.limit(rates) == 100
    assert Work().limit(rates) == 0


def test_products_of_a_gpu_are_told_in_the_format_that_torch_is_set_to() -> None:
    done = Work()
    with FakeTensorMode(), Counted(done.add):
        a = torch.empty(4, 4, device="cuda")
        with matmul_settings(fp32_precision="ieee"):
            _ = a @ a
        quick_product(a, a)
        quick_product(a.bfloat16(), a.bfloat16())
    assert done.flops == {"float32": 2 * 4**3, work.TF32: 2 * 4**3, "bfloat16": 2 * 4**3}
