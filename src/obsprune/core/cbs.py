"""The Combinatorial Brain Surgeon (Yu, Serra, Ramalingam & Zhe 2022): which weights to remove together.

CBS-S: of all sets of a size the one that raises E = ½ Σ w_i y_i F_ij w_j y_j least, y = 1 where a weight is removed:
two weights that cancel one another go together. A local search: from magnitude's set, one weight comes back and another
goes, as long as E falls. CBS-U: then the survivors move to their joint minimum (`Fisher.joint_update`).

F is that of core/fisher.py, never formed: how two weights act on each other takes M ≤ N multiplications. Legend as
there; x_P = w_P where a weight is removed, else 0; L candidates, the weights that a round looks at, and V_LM what each
adds to S x when it is flipped: comes back or goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.core.fisher import Fisher, Layout, Surgeon, keep_best


def objective(fisher: Fisher, w_P: Tensor, keep_P: Tensor) -> float:
    """E = ½ xᵀFx."""
    x_P = w_P * ~keep_P
    return float((x_P * fisher.product(x_P)).sum(dtype=torch.float64)) / 2


def flip_costs(fisher: Fisher, w_P: Tensor, keep_P: Tensor) -> Tensor:
    """What E rises by when each weight alone is flipped [P]: ±w (Fx) + ½ w² F_qq; negative for one that should."""
    Fx_P = fisher.product(w_P * ~keep_P)
    return _signed(w_P, keep_P) * Fx_P + w_P.square() * fisher.diagonal() / 2


@dataclass(frozen=True)
class Search:
    """When to look where. candidates: weights that a round looks at on either side, those that cost least; tries: how
    many to take back in turn before a round gives up (τ in the paper); least: the share of E that a round must win, or
    it is the last one.
    """

    candidates: int = 4096
    tries: int = 20
    least: float = 1e-2

    def improve(self, fisher: Fisher, w_P: Tensor, keep_P: Tensor) -> Tensor:
        """The mask after all swaps, with as many weights as before. What is zero takes no part."""
        keep_P, E = keep_P.clone(), objective(fisher, w_P, keep_P)
        blocks_P, won = fisher.layout.blocks().to(w_P.device), torch.inf
        while won > self.least * E:
            won = self._round(fisher, w_P, keep_P, blocks_P)
            E -= won
        return keep_P

    def _round(self, fisher: Fisher, w_P: Tensor, keep_P: Tensor, blocks_P: Tensor) -> float:
        """Swaps among the candidates, in keep itself; returns what they win."""
        cost_P = flip_costs(fisher, w_P, keep_P).masked_fill(w_P == 0, torch.inf)
        back = _least(cost_P.masked_fill(keep_P, torch.inf), self.candidates)
        index_L = torch.cat([back, _least(cost_P.masked_fill(~keep_P, torch.inf), self.candidates)])
        V_LM = (fisher.S_MP[:, index_L] * _signed(w_P, keep_P)[index_L]).T.contiguous()
        candidates = Candidates(V_LM, blocks_P[index_L], len(back))
        cost_L, won = cost_P[index_L], 0.0
        while (swap := candidates.swap(cost_L, self.tries)) is not None:
            flipped, cost_L, saved = swap
            keep_P[index_L[flipped]] = ~keep_P[index_L[flipped]]
            won += saved
        return won


@dataclass(frozen=True, eq=False)
class Candidates:
    """The weights of one round: the first `back` of them are removed and may come back, the others may go."""

    V_LM: Tensor
    blocks_L: Tensor
    back: int

    def swap(self, cost_L: Tensor, tries: int) -> tuple[list[int], Tensor, float] | None:
        """Both weights, all costs afterwards, and what is won by the first swap that wins: the cheapest to take back,
        then the cheapest to remove in its place; None where `tries` of the first do not win.
        """
        for i in _least(cost_L[: self.back], tries).tolist():
            without_L = self.flipped(cost_L, i)
            if self.back == len(cost_L):
                break
            j = self.back + int(without_L[self.back :].argmin())
            change = float(cost_L[i]) + float(without_L[j])
            if change < 0:
                return [i, j], self.flipped(without_L, j), -change
        return None

    def flipped(self, cost_L: Tensor, k: int) -> Tensor:
        """All costs once k is flipped; itself it takes no further part. Only its own block feels it."""
        near = (self.blocks_L == self.blocks_L[k]).nonzero()[:, 0]
        cost_L = cost_L.clone()
        cost_L[near] += self.V_LM[near] @ self.V_LM[k]
        cost_L[k] = torch.inf
        return cost_L


@final
@dataclass(frozen=True)
class CombinatorialSurgeon(Surgeon):
    """CBS-S from magnitude's set, and CBS-U where survivors are to `update`."""

    damping: float = 1e-3
    width: int = 64
    update: bool = True
    search: Search = Search()

    def operate(
        self, w_P: Tensor, G_NP: Tensor, sizes: Sequence[int], before_P: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        fisher = Fisher.of(G_NP, self.damping, Layout(sizes, self.width))
        keep_P = self.search.improve(fisher, w_P, keep_best(w_P.abs(), w_P, before_P, count))
        return (fisher.joint_update(w_P, keep_P) if self.update else w_P * keep_P), keep_P


def _signed(w_P: Tensor, keep_P: Tensor) -> Tensor:
    """What x changes by when a weight is flipped: it goes, +w, or it comes back, −w."""
    return torch.where(keep_P, w_P, -w_P)


def _least(cost_L: Tensor, count: int) -> Tensor:
    """The places of the least costs, the least first, at most `count`; infinite ones are none."""
    places = cost_L.argsort(stable=True)[:count]
    return places[cost_L[places].isfinite()]
