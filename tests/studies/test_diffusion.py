"""The solver against what can be known: what goes in stays in, a linear soil has a solution in closed form, R is θ'."""

from __future__ import annotations

import math

import pytest
import torch

from obsprune.errors import ObspruneError
from obsprune.studies.elimination.diffusion import Column, Soil


def empty(column: Column, value: float = 0.0) -> torch.Tensor:
    return torch.full((1, column.cells), value, dtype=torch.float64)


def test_retardation_is_the_derivative_of_the_total() -> None:
    u = torch.linspace(0.01, 1, 20, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(Soil().total(u).sum(), u)
    torch.testing.assert_close(slope, Soil().retardation(u).detach())
    assert abs(float(Soil().retardation(torch.ones(1))) - 3.157) < 1e-3


def test_what_is_conserved_is() -> None:
    column = Column(cells=32, steps=40, step=5)
    states, (A, f) = column.solve(empty(column, 0.1)), column.transport()
    total = column.soil.total(states).mean(-1)
    gained = 5 * (states[1:] @ A.T + f).mean(-1)
    torch.testing.assert_close(total.diff(dim=0), gained, rtol=1e-9, atol=1e-12)
    flow = 2 * 5e-4 * 32 * (1 - states[1:, :, 0])  # in by the first wall
    out = states[1:, :, -1] / (1 + 0.5 / 32 / 5e-4)
    torch.testing.assert_close(gained, 5 * (flow - out), rtol=1e-9, atol=1e-12)


def test_without_a_curved_isotherm_it_is_the_error_function() -> None:
    # n = 1: R is a number, and a front that has not reached the far wall is erfc(x / (2 √(D t / R)))
    column = Column(Soil(n=1.0), cells=200, steps=400, step=0.25)
    found = column.solve(empty(column))[-1, 0]
    R = 1 + column.soil.sorbing
    expected = torch.erfc(column.places / (2 * math.sqrt(5e-4 * 100 / R)))
    assert float((found - expected).abs().max()) < 2e-3


def test_finer_steps_come_nearer() -> None:
    def end(steps: int) -> torch.Tensor:
        column = Column(cells=32, steps=steps, step=200 / steps)
        return column.solve(empty(column, 0.05))[-1]

    finest = end(160)
    coarse, fine = (float((end(steps) - finest).abs().max()) for steps in (10, 40))
    assert 0 < fine < 0.4 * coarse


def test_concentrations_rise_and_fall_along_the_column() -> None:
    column = Column(cells=32, steps=30)
    states = column.solve(torch.tensor([[0.0], [0.2]], dtype=torch.float64).expand(2, 32))
    assert float(states.min()) >= 0 and float(states.max()) < 1
    assert bool((states[-1].diff(dim=-1) < 0).all())
    assert bool((states[-1, 1] > states[-1, 0]).all())  # what was there before is still there


def test_what_cannot_be_solved_is_said() -> None:
    column = Column(cells=8, steps=1)
    with pytest.raises(ObspruneError, match="shorten `step`"):
        column.solve(empty(column, math.nan))
