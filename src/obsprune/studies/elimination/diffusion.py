"""Diffusion and sorption in a column of soil: ∂u/∂t = D/R(u) ∂²u/∂x² for 0 < x < 1, the equation of PDEBench (Takamoto
et al., NeurIPS 2022), solved here by finite volumes and backward Euler.

R is the derivative of the total concentration θ(u) = u + s (u + ε)^n, dissolved and sorbed (Freundlich's isotherm), so
that ∂θ/∂t = D ∂²u/∂x²: θ is what is conserved, and what is solved for. u = 1 at x = 0; −D ∂u/∂x = u at x = 1.

Legend: u_BX concentrations of B columns at the middles of X cells, in float64; t in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obsprune.errors import ObspruneError

EPSILON = 1e-6
"""u + ε under the root: R would be infinite at u = 0."""
CLOSE = 1e-12
"""A Newton step that moves no concentration further than this is the last."""
NEWTON = 50
"""Newton steps at most; a handful is usual."""


@dataclass(frozen=True)
class Soil:
    """PDEBench's numbers. diffusivity D [m²/s]; porosity φ; density ρ [kg/m³] of the grains; k, n of Freundlich."""

    diffusivity: float = 5e-4
    porosity: float = 0.29
    density: float = 2880.0
    k: float = 3.5e-4
    n: float = 0.874

    @property
    def sorbing(self) -> float:
        """s = (1 − φ)/φ · ρ k."""
        return (1 - self.porosity) / self.porosity * self.density * self.k

    def total(self, u: Tensor) -> Tensor:
        """θ, dissolved and sorbed."""
        return u + self.sorbing * (u + EPSILON) ** self.n

    def retardation(self, u: Tensor) -> Tensor:
        """R = dθ/du."""
        return 1 + self.sorbing * self.n * (u + EPSILON) ** (self.n - 1)


@dataclass(frozen=True)
class Column:
    """A column of `cells` cells, followed for `steps` steps of `step` seconds."""

    soil: Soil = Soil()
    cells: int = 64
    steps: int = 100
    step: float = 5.0

    @property
    def places(self) -> Tensor:
        """Middles of the cells [X]."""
        return (torch.arange(self.cells, dtype=torch.float64) + 0.5) / self.cells

    @property
    def times(self) -> Tensor:
        """Of the states that `solve` returns [steps + 1]."""
        return self.step * torch.arange(self.steps + 1, dtype=torch.float64)

    def solve(self, start_BX: Tensor) -> Tensor:
        """u at all times [steps + 1, B, X]. Raises ObspruneError when Newton's method does not converge."""
        operator_XX, inflow_X = self.transport()
        states = [start_BX]
        for _ in range(self.steps):
            states.append(self._advance(states[-1], operator_XX, inflow_X))
        return torch.stack(states)

    def transport(self) -> tuple[Tensor, Tensor]:
        """A [X, X] and f [X] with ∂θ/∂t = A u + f. The first wall is half a cell away and holds u = 1; what leaves by
        the last one, D (u − w)/(½ Δx), is the concentration w at that wall.
        """
        width, D = 1 / self.cells, self.soil.diffusivity
        between = torch.full((self.cells - 1,), D / width, dtype=torch.float64)
        out = 1 / (1 + 0.5 * width / D)
        loss_X = torch.cat([between, between.new_tensor([out])]) + torch.cat(
            [between.new_tensor([2 * D / width]), between]
        )
        A_XX = torch.diag(between, 1) + torch.diag(between, -1) - torch.diag(loss_X)
        f_X = torch.zeros(self.cells, dtype=torch.float64)
        f_X[0] = 2 * D / width
        return A_XX / width, f_X / width

    def _advance(self, u_BX: Tensor, A_XX: Tensor, f_X: Tensor) -> Tensor:
        """One step of backward Euler: Newton's method on θ(v) − θ(u) − Δt (A v + f) = 0."""
        before, v = self.soil.total(u_BX), u_BX
        for _ in range(NEWTON):
            residual = self.soil.total(v) - before - self.step * (v @ A_XX.T + f_X)
            slope_BXX = torch.diag_embed(self.soil.retardation(v)) - self.step * A_XX
            move: Tensor = torch.linalg.solve(slope_BXX, residual)
            v = (v - move).clamp_min(0)
            if float(move.abs().max()) < CLOSE:
                return v
        raise ObspruneError(
            f"Newton's method moved by {float(move.abs().max()):.2g} after {NEWTON} steps; shorten `step`"
        )
