"""The importance of a weight against what it is defined by: the least change of an output that is linear in the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obsprune.core.elimination import Heard, Sketch, of_outputs

B, T, C, R, K = 7, 2, 4, 3, 5


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, C], J [K, B, T, R], W [R, C]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, C), (K, B, T, R), (R, C)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


def heard_of(x: Tensor, J: Tensor) -> Heard:
    heard = Heard(R, C)
    for samples in (slice(0, 3), slice(3, None)):
        for d in J:
            heard.add(x[samples], d[samples])
    return heard


def change(x: Tensor, J: Tensor, w: float, r: int, c: int, shift: float) -> float:
    """Σ ‖J (δ − w a)‖² of one row, sample by sample; tokens are samples."""
    total = 0.0
    for b in range(B):
        for t in range(T):
            total += float((J[:, b, t, r] * (shift - w * x[b, t, c])).square().sum())
    return total


def test_nothing_is_better_than_the_shift_and_what_is_left_is_the_importance(
    drawn: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, J, W = drawn
    heard = heard_of(x, J)
    assert heard.count == K * B * T
    for r in range(R):
        for c in range(C):
            w, best = float(W[r, c]), float(W[r, c] * heard.mean_RC[r, c])
            least = change(x, J, w, r, c, best)
            assert least == pytest.approx(float(heard.importance(W)[r, c]), rel=1e-9)
            assert all(change(x, J, w, r, c, best + away) > least for away in (-0.1, 0.01, 0.3))
            assert change(x, J, w, r, c, 0.0) == pytest.approx(float(heard.uncompensated(W)[r, c]), rel=1e-9)


def test_laws(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    x, J, W = drawn
    heard = heard_of(x, J)
    assert bool((heard.importance(W) <= heard.uncompensated(W)).all())
    assert torch.equal(heard.importance(2 * W), 4 * heard.importance(W))
    torch.testing.assert_close(heard_of(x, 3 * J).importance(W), 9 * heard.importance(W))
    moved = heard_of(x + 2.0, J)  # another origin of the inputs: the bias's business alone
    torch.testing.assert_close(moved.importance(W), heard.importance(W))
    torch.testing.assert_close(moved.mean_RC, heard.mean_RC + 2)


def test_a_constant_input_costs_nothing_and_its_bias_takes_it_all(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    x, J, W = drawn
    x[..., 1] = 0.5
    heard = heard_of(x, J)
    assert float(heard.importance(W)[:, 1].max()) < 1e-13 < float(heard.uncompensated(W)[:, 1].min())
    torch.testing.assert_close(heard.mean_RC[:, 1], torch.full((R,), 0.5, dtype=torch.float64))


def test_a_row_that_nobody_hears(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    x, J, W = drawn
    J[..., 2] = 0
    heard = heard_of(x, J)
    assert float(heard.importance(W)[2].abs().max()) == 0 == float(heard.mean_RC[2].abs().max())


def test_where_all_samples_are_heard_alike_it_is_variance_and_mean(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, W = drawn
    heard = Heard(R, C)
    heard.add(x, torch.ones(B, T, R, dtype=torch.float64))
    flat = x.flatten(0, 1)
    torch.testing.assert_close(heard.importance(W), W.square() * flat.var(0, correction=0) * len(flat))
    torch.testing.assert_close(heard.mean_RC, flat.mean(0).expand(R, C))


def no_loss(z: Tensor, asked: Tensor) -> Tensor:
    raise AssertionError("outputs alone count")


def test_cotangents_of_outputs_give_the_jacobian() -> None:
    rows = of_outputs(torch.zeros(2, 3), torch.zeros(2), no_loss)
    assert torch.equal(torch.stack(list(rows))[:, 1], torch.eye(3))


def test_a_sketch_has_the_jacobian_s_norm_as_its_mean() -> None:
    J_KR = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    (v_BK,) = Sketch(torch.Generator().manual_seed(0))(torch.zeros(200_000, 6), torch.zeros(1), no_loss)
    assert set(v_BK.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close((v_BK @ J_KR).square().mean(0), J_KR.square().sum(0), rtol=0.02, atol=0)
