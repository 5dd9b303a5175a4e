from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor

from obsprune.core.linalg import LADDER, damped, dead_columns, factorise, layer_loss, upper_factor
from obsprune.core.statistics import Gram
from obsprune.errors import NotPositiveDefinite


def gram_matrix(columns: int, tokens: int | None = None) -> Tensor:
    random = torch.Generator().manual_seed(columns)
    x_TC = torch.randn(tokens or 3 * columns, columns, generator=random, dtype=torch.float64)
    return x_TC.T @ x_TC


@pytest.mark.parametrize("columns", [1, 2, 17, 130, 300])
def test_the_factor_is_upper_triangular_and_its_inverse_that_of_the_inverse(columns: int) -> None:
    gram = Gram.of(gram_matrix(columns), 1, "a matrix")
    A_CC, factor = damped(gram.H_CC, 0.01), factorise(gram, 0.01)
    for upper_CC in (factor.K_CC, factor.U_CC):
        assert torch.equal(upper_CC, upper_CC.triu())
        assert bool((upper_CC.diagonal() > 0).all())
    assert torch.allclose(factor.K_CC @ factor.K_CC.T, A_CC, rtol=1e-12)
    assert torch.allclose(factor.U_CC.T @ factor.U_CC, torch.linalg.inv(A_CC), rtol=1e-9, atol=1e-12)


def test_the_factor_holds_the_inverses_of_what_remains() -> None:
    # The fact SparseGPT rests on: U_c,: · U_cc is the first row of the inverse of A[c:, c:], whose own factor is in K.
    A_CC = gram_matrix(9)
    K_CC = upper_factor(A_CC)
    assert K_CC is not None
    U_CC = torch.linalg.inv(K_CC)
    for c, row in enumerate(reference.inverses(A_CC)):
        assert torch.allclose(U_CC[c, c:] * U_CC[c, c], row, rtol=1e-9, atol=1e-12)
        assert torch.allclose(K_CC[c:, c:] @ K_CC[c:, c:].T, A_CC[c:, c:], rtol=1e-12)


def overflowing(columns: int) -> Tensor:
    """Positive definite, with an exact Cholesky factor whose inverse holds powers of ten up to 10^(columns − 1)."""
    L_CC = torch.eye(columns) - 10 * torch.eye(columns).roll(1, 0).tril(-1)
    return (L_CC @ L_CC.T).flip(0, 1)


@pytest.mark.parametrize(
    "A_CC",
    [
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        torch.ones(5, 5),
        torch.zeros(3, 3),
        -torch.eye(2),
        torch.full((2, 2), torch.nan),
        torch.diag(torch.tensor([1.0, torch.inf, 1.0])),
        overflowing(50),
    ],
    ids=["indefinite", "singular", "zero", "negative", "nan", "infinite", "overflowing"],
)
def test_there_is_no_factor_of_what_is_not_safely_positive_definite(A_CC: Tensor) -> None:
    assert upper_factor(A_CC) is None


@pytest.mark.parametrize("dead", [[], [0, 4, 8]], ids=["alive", "dead"])
def test_damped_adds_a_share_of_the_mean_live_diagonal(dead: list[int]) -> None:
    H_CC = gram_matrix(9)
    H_CC[dead] = 0
    H_CC[:, dead] = 0
    before = H_CC.clone()
    assert dead_columns(H_CC).nonzero().flatten().tolist() == dead
    assert torch.allclose(damped(H_CC, 0.25), reference.damp(H_CC, 0.25), rtol=1e-14)
    assert torch.equal(H_CC, before)


def test_damped_without_damping_only_fills_dead_columns() -> None:
    H_CC = torch.diag(torch.tensor([1.0, 0.0, 3.0]))
    assert torch.equal(damped(H_CC, 0.0), torch.diag(torch.tensor([1.0, 2.0, 3.0])))


def test_damped_of_zeros_is_a_multiple_of_the_identity() -> None:
    assert torch.allclose(damped(torch.zeros(4, 4), 0.01), 1.01 * torch.eye(4))


def test_factorise_uses_the_damping_asked_for_when_it_can() -> None:
    H_CC = gram_matrix(12).float()
    for damping in (0.0, 0.003, 0.5, 2.0):
        factor = factorise(Gram.of(H_CC, 36), damping)
        assert factor.damping == damping
        assert factor.U_CC.dtype == torch.float32
        assert torch.allclose(
            factor.U_CC.T @ factor.U_CC, torch.linalg.inv(damped(H_CC, damping)), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("step", range(len(LADDER) - 1))
def test_factorise_climbs_to_the_first_step_that_works(step: int) -> None:
    # Eigenvalue −(a damping halfway, in logarithms, between two steps) needs the upper one.
    below, above = LADDER[step], LADDER[step + 1]
    c = 1 + (below * above) ** 0.5
    H_CC = torch.tensor([[1.0, c], [c, 1.0]])
    factor = factorise(Gram.of(H_CC, 1), 0.0)
    assert factor.damping == above
    assert torch.equal(factor.U_CC, factorise(Gram.of(H_CC, 1), above).U_CC)


def test_factorise_falls_back_to_float64_before_it_gives_up() -> None:
    # The mean of this diagonal overflows float32, so no damping helps there.
    factor = factorise(Gram.of(2e38 * torch.eye(6), 1), 0.01)
    assert factor.damping == 0.01
    assert factor.U_CC.dtype == torch.float32
    assert torch.allclose(factor.U_CC * 2.02e38**0.5, torch.eye(6))


@pytest.mark.parametrize("damping", [0.01, 0.5, 5.0])
def test_factorise_names_what_it_cannot_do(damping: float) -> None:
    gram = Gram.of(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), 33, "blocks.2.attn.q")
    with pytest.raises(NotPositiveDefinite, match=r"blocks\.2\.attn\.q \(2 columns, 33 tokens\)") as caught:
        factorise(gram, damping)
    assert caught.value.damping == max(damping, 1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_factorise_refuses_inputs_that_are_not_finite(bad: float) -> None:
    x_TC = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    x_TC[3, 2] = bad
    gram = Gram(6)
    gram.add(x_TC)
    with pytest.raises(NotPositiveDefinite):
        factorise(gram, 0.01)


def test_layer_loss_is_the_output_error_summed_over_tokens() -> None:
    random = torch.Generator().manual_seed(0)
    D_RC, x_TC = torch.randn(5, 12, generator=random), torch.randn(40, 12, generator=random)
    zero_RC = torch.zeros(5, 12)
    expected = reference.direct_loss(D_RC, zero_RC, x_TC)
    assert layer_loss(D_RC, x_TC.T @ x_TC) == pytest.approx(expected, rel=1e-5)
    assert layer_loss(D_RC.bfloat16(), x_TC.T @ x_TC) == pytest.approx(
        reference.direct_loss(D_RC.bfloat16(), zero_RC, x_TC), rel=1e-5
    )
