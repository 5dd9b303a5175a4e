"""Divergence and likelihood against torch's own; the optimizer against torch.optim."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from obsprune.core.iobs import natural_direction
from obsprune.core.linalg import damped, factorise
from obsprune.core.losses import divergence, log_probabilities, next_token_nll, perplexity
from obsprune.core.optimizers import Adam, cosine
from obsprune.core.statistics import Gram


def test_divergence_is_kl_of_dense_and_pruned() -> None:
    torch.manual_seed(0)
    s, t = (log_probabilities(torch.randn(2, 3, 7)) for _ in range(2))
    expected = functional.kl_div(s, t, log_target=True, reduction="sum")
    torch.testing.assert_close(divergence(s, t), expected)
    assert float(divergence(t, t)) == 0
    t.requires_grad_(True)
    assert not divergence(s, t).requires_grad


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(5, 9).bfloat16()
    assert torch.equal(log_probabilities(logits), functional.log_softmax(logits.float(), -1))
    assert log_probabilities(logits.double()).dtype == torch.float64


def test_next_tokens() -> None:
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(next_token_nll(log_probabilities(logits), ids), expected)
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert math.isfinite(perplexity(1e9))


def test_adam_is_adam() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    w, m, v = parameter.detach().clone(), torch.zeros(3, 4), torch.zeros(3, 4)
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    for number in range(1, 6):
        parameter.grad = torch.randn(3, 4)
        Adam().step(w, parameter.grad, m, v, 0.01, number)
        optimizer.step()
        torch.testing.assert_close(w, parameter.detach())


def test_cosine() -> None:
    assert cosine(0) == 1
    assert cosine(0.5) == pytest.approx(0.5)
    assert cosine(1) == pytest.approx(0)


def test_natural_direction_is_the_gradient_times_the_inverse_gram() -> None:
    """With the gradient of the layer's own loss the undamped step leads to the dense weight at once."""
    torch.manual_seed(0)
    x_TC, W_RC = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    gram = Gram.of(x_TC.T @ x_TC, 50)
    g_RC = torch.randn(4, 6, dtype=torch.float64)
    U_CC = factorise(gram, 0.01).U_CC
    torch.testing.assert_close(natural_direction(g_RC, U_CC), torch.linalg.solve(damped(gram.H_CC, 0.01), g_RC.T).T)
    Z_RC = W_RC * (torch.rand(4, 6) < 0.5)
    step = natural_direction((Z_RC - W_RC) @ gram.H_CC, factorise(gram, 0.0).U_CC)
    torch.testing.assert_close(Z_RC - step, W_RC)
