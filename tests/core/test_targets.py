"""Corrected targets against least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obsprune.core.linalg import damped, layer_loss
from obsprune.core.targets import MOST, best_share, correction, gain_and_cost


def problem(drift: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W, X, T, H) in float64, tokens as columns as in the paper's formula; T the dense layer's outputs."""
    random = torch.Generator().manual_seed(0)
    W_RC = torch.randn(4, 6, generator=random).double()
    Y_CT = torch.randn(6, 200, generator=random).double()
    X_CT = Y_CT + drift * torch.randn(6, 200, generator=random).double()
    return W_RC, X_CT, W_RC @ Y_CT, X_CT @ X_CT.T


def missing(W_RC: Tensor, X_CT: Tensor, T_RT: Tensor) -> Tensor:
    return (T_RT - W_RC @ X_CT) @ X_CT.T


def test_without_drift_the_target_is_the_weight() -> None:
    W_RC, X_CT, T_RT, H_CC = problem(0.0)
    assert float(correction(missing(W_RC, X_CT, T_RT), H_CC, 0.01).abs().max()) < 1e-12


def test_it_minimises_the_mismatch_with_a_pull_toward_the_weight() -> None:
    W_RC, X_CT, T_RT, H_CC = problem(0.5)
    ridge = float((damped(H_CC, 0.01) - H_CC)[0, 0])
    found = W_RC + correction(missing(W_RC, X_CT, T_RT), H_CC, 0.01)
    stacked = torch.cat([X_CT, ridge**0.5 * torch.eye(6).double()], 1)
    wanted = torch.cat([T_RT, ridge**0.5 * W_RC], 1)
    torch.testing.assert_close(found, torch.linalg.lstsq(stacked.T, wanted.T).solution.T)


def test_the_plain_layer_problem_with_it_is_the_whole_problem() -> None:
    """Losses of any two answers differ by the same amount in both forms."""
    W_RC, X_CT, T_RT, H_CC = problem(0.5)
    A_CC = damped(H_CC, 0.01)
    ridge = float((A_CC - H_CC)[0, 0])
    target = W_RC + correction(missing(W_RC, X_CT, T_RT), H_CC, 0.01)

    def whole(Z_RC: Tensor) -> float:
        return float((Z_RC @ X_CT - T_RT).square().sum() + ridge * (Z_RC - W_RC).square().sum())

    one, other = torch.randn(2, 4, 6).double()
    assert whole(one) - whole(other) == pytest.approx(
        layer_loss(target - one, A_CC) - layer_loss(target - other, A_CC), rel=1e-9
    )


def test_the_best_share_is_where_the_error_is_least() -> None:
    """Against a fine grid, over two layers together; beyond its bounds it stays at them."""
    layers, errors = [], torch.zeros(2001).double()
    for seed in range(2):
        W_RC, X_CT, T_RT, H_CC = problem(0.5)
        M_RC = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).double()
        M_RC += 3 * correction(missing(W_RC, X_CT, T_RT), H_CC, 0.01)
        layers.append((M_RC, missing(W_RC, X_CT, T_RT), H_CC))
        for index in range(2001):
            errors[index] += ((W_RC + (index / 2000 - 0.5) * M_RC) @ X_CT - T_RT).square().sum()
    best = int(errors.argmin()) / 2000 - 0.5
    assert 0 < best < MOST
    assert best_share(*gain_and_cost(layers)) == pytest.approx(best, abs=1e-3)
    assert best_share(*gain_and_cost(layers), best / 2) == best / 2
    assert best_share(*gain_and_cost([(-M_RC, D_RC, H_CC) for M_RC, D_RC, H_CC in layers])) == 0
    assert best_share(*gain_and_cost([(0 * M_RC, D_RC, H_CC) for M_RC, D_RC, H_CC in layers])) == 0


def test_dead_inputs_keep_the_weight() -> None:
    W_RC, X_CT, T_RT, _ = problem(0.5)
    X_CT[2] = 0
    found = W_RC + correction(missing(W_RC, X_CT, T_RT), X_CT @ X_CT.T, 0.01)
    torch.testing.assert_close(found[:, 2], W_RC[:, 2])
