"""Corrected targets against least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obsprune.core.linalg import damped, layer_loss
from obsprune.core.targets import corrected, mismatch


def problem(drift: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W, X, T, H) in float64, tokens as columns as in the paper's formula; T the dense layer's outputs."""
    random = torch.Generator().manual_seed(0)
    W_RC = torch.randn(4, 6, generator=random).double()
    Y_CT = torch.randn(6, 200, generator=random).double()
    X_CT = Y_CT + drift * torch.randn(6, 200, generator=random).double()
    return W_RC, X_CT, W_RC @ Y_CT, X_CT @ X_CT.T


def test_without_drift_the_target_is_the_weight() -> None:
    W_RC, X_CT, T_RT, H_CC = problem(0.0)
    torch.testing.assert_close(corrected(W_RC, T_RT @ X_CT.T, H_CC, 0.01), W_RC)


def test_it_minimises_the_mismatch_with_a_pull_toward_the_weight() -> None:
    W_RC, X_CT, T_RT, H_CC = problem(0.5)
    ridge = float((damped(H_CC, 0.01) - H_CC)[0, 0])
    found = corrected(W_RC, T_RT @ X_CT.T, H_CC, 0.01)
    stacked = torch.cat([X_CT, ridge**0.5 * torch.eye(6).double()], 1)
    wanted = torch.cat([T_RT, ridge**0.5 * W_RC], 1)
    torch.testing.assert_close(found, torch.linalg.lstsq(stacked.T, wanted.T).solution.T)


def test_the_plain_layer_problem_with_it_is_the_whole_problem() -> None:
    """Losses of any two answers differ by the same amount in both forms."""
    W_RC, X_CT, T_RT, H_CC = problem(0.5)
    A_CC = damped(H_CC, 0.01)
    ridge = float((A_CC - H_CC)[0, 0])
    target = corrected(W_RC, T_RT @ X_CT.T, H_CC, 0.01)

    def whole(Z_RC: Tensor) -> float:
        return float((Z_RC @ X_CT - T_RT).square().sum() + ridge * (Z_RC - W_RC).square().sum())

    one, other = torch.randn(2, 4, 6).double()
    assert whole(one) - whole(other) == pytest.approx(
        layer_loss(target - one, A_CC) - layer_loss(target - other, A_CC), rel=1e-9
    )


def test_mismatch_is_the_squared_error_but_for_a_constant() -> None:
    _, X_CT, T_RT, H_CC = problem(0.5)
    one, other = torch.randn(2, 4, 6).double()
    direct = [float((V_RC @ X_CT - T_RT).square().sum()) for V_RC in (one, other)]
    ours = [mismatch(V_RC, T_RT @ X_CT.T, H_CC) for V_RC in (one, other)]
    assert ours[0] - ours[1] == pytest.approx(direct[0] - direct[1], rel=1e-9)


def test_dead_inputs_keep_the_weight() -> None:
    W_RC, X_CT, T_RT, _ = problem(0.5)
    X_CT[2] = 0
    found = corrected(W_RC, T_RT @ X_CT.T, X_CT @ X_CT.T, 0.01)
    torch.testing.assert_close(found[:, 2], W_RC[:, 2])
