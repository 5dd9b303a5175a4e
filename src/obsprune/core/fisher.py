"""The empirical Fisher matrix of the weights of a whole network, and what it says of removing many of them at once.

F = λI + (1/N) Σ g gᵀ over N gradients, block-diagonal: a block is `width` consecutive weights of one matrix, or the
rest at its end. What is inverted is never larger than a block, or than N where that is less.

Legend: w_P weights of all matrices, one after the other; G_NP their gradients, one row a sample; S_MP the root of F, a
block being λI + SᵀS: G/√N, or what is left of it once every block is turned into a triangle, M = min(N, width); K
blocks of B weights each; keep_P True = survives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.core.patterns import Lowest

CHUNK_BYTES = 2**27
"""What is worked on together stays under this, in float64."""


@final
@dataclass(frozen=True)
class Layout:
    """How the weights lie in blocks. sizes: weights of each matrix, in their order; width: of a block."""

    sizes: Sequence[int]
    width: int

    def runs(self, rows: int) -> Iterator[tuple[slice, int]]:
        """Neighbouring blocks of one width, as many as can be worked on together with so many numbers a weight."""
        start = 0
        for size in self.sizes:
            stop, width = start + size, min(self.width, size)
            whole = start + size // width * width
            most = max(1, CHUNK_BYTES // (8 * rows * width)) * width
            yield from ((slice(a, min(a + most, whole)), width) for a in range(start, whole, most))
            if whole < stop:
                yield slice(whole, stop), stop - whole
            start = stop

    def blocks(self) -> Tensor:
        """The number of each weight's block [P]."""
        found, first = [], 0
        for part, width in self.runs(1):
            count = (part.stop - part.start) // width
            found.append(torch.arange(first, first + count).repeat_interleave(width))
            first += count
        return torch.cat(found)


def root_of(G_NP: Tensor, layout: Layout) -> Tensor:
    """S of (1/N) GᵀG: block by block the triangular factor of G/√N, which has its Gram and as many rows as columns."""
    samples = len(G_NP)
    if samples <= layout.width:
        return G_NP / math.sqrt(samples)
    S_MP = torch.zeros(layout.width, G_NP.shape[1], dtype=G_NP.dtype, device=G_NP.device)
    for part, width in layout.runs(samples):
        R_KMB = torch.linalg.qr(_by_block(G_NP[:, part], width), mode="r").R / math.sqrt(samples)
        S_MP[: R_KMB.shape[1], part] = R_KMB.movedim(1, 0).flatten(1)
    return S_MP


@final
@dataclass(frozen=True, eq=False)
class Fisher:
    """F, never formed. ridge: λ."""

    S_MP: Tensor
    ridge: float
    layout: Layout

    @classmethod
    def of(cls, G_NP: Tensor, damping: float, layout: Layout) -> Fisher:
        """λ = damping · mean of all squared gradients: one λ for all blocks, which are parts of one matrix."""
        mean = sum(float(row_P.square().mean(dtype=torch.float64)) for row_P in G_NP) / len(G_NP)
        return cls(root_of(G_NP, layout), damping * (mean or 1.0), layout)

    def diagonal(self) -> Tensor:
        """F_qq of every weight [P]."""
        return self._mapped(lambda S_KMB: S_KMB.square().sum(1)) + self.ridge

    def product(self, x_P: Tensor) -> Tensor:
        """F x [P]."""

        def multiplied(S_KMB: Tensor, x_KB: Tensor) -> Tensor:
            return S_KMB.mT @ (S_KMB @ x_KB[:, :, None])

        return self._mapped(multiplied, x_P) + self.ridge * x_P

    def inverse_diagonal(self) -> Tensor:
        """[F⁻¹]_qq of every weight [P]."""
        return self._mapped(lambda S_KMB: inverse(S_KMB.double(), self.ridge).diagonal(dim1=1, dim2=2))

    def saliency(self, w_P: Tensor) -> Tensor:
        """w_q² / (2 [F⁻¹]_qq): what F says the loss rises by without q, all others in its block adjusted [P]."""
        return w_P.square() / (2 * self.inverse_diagonal())

    def joint_update(self, w_P: Tensor, keep_P: Tensor) -> Tensor:
        """The weights with those of keep at the minimum of ½ δᵀFδ given that all others are zero [P].

        F_KK δ_K = F_KQ w_Q with Q what is removed: the Optimal Brain Surgeon's step for all of Q together,
        −F⁻¹E([F⁻¹]_QQ)⁻¹ w_Q, by a system in the survivors.
        """

        def step(S_KMB: Tensor, w_KB: Tensor, keep_KB: Tensor) -> Tensor:
            S_KMB, w_KB = S_KMB.double(), w_KB.double()
            removed_KM1 = S_KMB @ (w_KB * ~keep_KB)[:, :, None]
            S_KMB = S_KMB * keep_KB[:, None, :]  # without its columns Q stands apart, and at 0
            return (w_KB + solve(S_KMB, self.ridge, S_KMB.mT @ removed_KM1)[:, :, 0]) * keep_KB

        return self._mapped(step, w_P, keep_P)

    def separate_update(self, w_P: Tensor, keep_P: Tensor) -> Tensor:
        """As published for WoodFisher: −F⁻¹(w_Q / diag F⁻¹), the steps for each of Q alone, added; then zeros in Q [P].

        It is the joint one where one weight of a block is removed, and overshoots where many are.
        """

        def step(S_KMB: Tensor, w_KB: Tensor, keep_KB: Tensor) -> Tensor:
            inverse_KBB, w_KB = inverse(S_KMB.double(), self.ridge), w_KB.double()
            alone_KB = w_KB * ~keep_KB / inverse_KBB.diagonal(dim1=1, dim2=2)
            return (w_KB - (inverse_KBB @ alone_KB[:, :, None])[:, :, 0]) * keep_KB

        return self._mapped(step, w_P, keep_P)

    def _mapped(self, function: Callable[..., Tensor], *vectors_P: Tensor) -> Tensor:
        """A function of S and of vectors, block by block, in the dtype of S [P]."""
        found = []
        for part, width in self.layout.runs(max(len(self.S_MP), self.layout.width)):
            blocks = (v_P[part].view(-1, width) for v_P in vectors_P)
            found.append(function(_by_block(self.S_MP[:, part], width), *blocks).flatten().to(self.S_MP.dtype))
        return torch.cat(found)


def inverse(S_KMB: Tensor, ridge: float) -> Tensor:
    """(λI + SᵀS)⁻¹ of every block [K, B, B]."""
    return solve(S_KMB, ridge, torch.eye(S_KMB.shape[2], dtype=S_KMB.dtype, device=S_KMB.device))


def solve(S_KMB: Tensor, ridge: float, Y_KBC: Tensor) -> Tensor:
    """(λI + SᵀS)⁻¹ Y of every block [K, B, C] by Woodbury's identity: (Y − Sᵀ(λI + SSᵀ)⁻¹ S Y) / λ."""
    A_KMM = S_KMB @ S_KMB.mT
    A_KMM.diagonal(dim1=1, dim2=2).add_(ridge)
    return (Y_KBC - S_KMB.mT @ torch.cholesky_solve(S_KMB @ Y_KBC, torch.linalg.cholesky(A_KMM))) / ridge


def _by_block(X_MP: Tensor, width: int) -> Tensor:
    """[K, M, B]."""
    return X_MP.view(len(X_MP), -1, width).movedim(0, 1)


class Surgeon(ABC):
    """Removes weights of all matrices together, given gradients of the loss by sample."""

    @abstractmethod
    def operate(
        self, w_P: Tensor, G_NP: Tensor, sizes: Sequence[int], before_P: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """The weights and what is kept of them, [P] both, `count` removed: first what is gone from `before`, then what
        is zero already. sizes: weights of each matrix.
        """


def keep_best(scores_P: Tensor, w_P: Tensor, before_P: Tensor, count: int) -> Tensor:
    """The mask without the `count` lowest scores, none of them negative; first goes what is gone or zero already."""
    ranked_P = scores_P.masked_fill(w_P == 0, -1.0).masked_fill(~before_P, -torch.inf)
    return Lowest(count).keep(ranked_P[None])[0]


@final
@dataclass(frozen=True)
class WoodFisher(Surgeon):
    """The least saliencies of F (Singh & Alistarh 2020). update: the survivors' answer; the paper adds up the steps for
    single weights (`Fisher.separate_update`).
    """

    damping: float = 1e-3
    width: int = 64
    update: Callable[[Fisher, Tensor, Tensor], Tensor] = Fisher.joint_update

    def operate(
        self, w_P: Tensor, G_NP: Tensor, sizes: Sequence[int], before_P: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        fisher = Fisher.of(G_NP, self.damping, Layout(sizes, self.width))
        keep_P = keep_best(fisher.saliency(w_P), w_P, before_P, count)
        return self.update(fisher, w_P, keep_P), keep_P
