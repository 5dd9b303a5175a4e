"""Slow, obvious definitions that the solvers are measured against: float64, one column or one mask at a time.

Nothing here imports obsprune, factorises by Cholesky, or selects without a sort.
Legend: W_RC dense weight, Z_RC sparse weight, x_TC inputs, H_CC = Σ x xᵀ, A_CC damped H_CC, keep_RC True = survives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def direct_loss(W_RC: Tensor, Z_RC: Tensor, x_TC: Tensor) -> float:
    """Σ over tokens of ‖(W − Z) x‖²."""
    return float((x_TC.double() @ (W_RC.double() - Z_RC.double()).T).square().sum())


def quadratic_loss(W_RC: Tensor, Z_RC: Tensor, A_CC: Tensor) -> float:
    """Σ over rows of d A dᵀ with d a row of W − Z."""
    return sum(float(d_C @ A_CC.double() @ d_C) for d_C in W_RC.double() - Z_RC.double())


def damp(H_CC: Tensor, damping: float) -> Tensor:
    """H plus damping × the mean of the live diagonal; a dead column has that mean as its own diagonal entry."""
    A_CC = H_CC.double().clone()
    diagonal = A_CC.diagonal()
    mean = float(diagonal[diagonal != 0].mean())
    for column in range(len(A_CC)):
        A_CC[column, column] = (float(diagonal[column]) or mean) + damping * mean
    return A_CC


@dataclass(frozen=True)
class Rule:
    """How masks are chosen: `width` columns at a time, by `choose(scores, start, stop)` on the weights as they are."""

    width: int
    choose: Callable[[Tensor, int, int], Tensor]


def drop_lowest(scores: Tensor, count: int) -> Tensor:
    """Keep mask of a vector of scores without its `count` lowest; ties by index."""
    keep = torch.ones(len(scores), dtype=torch.bool)
    order = sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))
    keep[order[:count]] = False
    return keep


def whole(sparsity: float, width: int = 128) -> Rule:
    """A share of the matrix. A tile drops what the cumulative budget has grown by."""

    def choose(scores: Tensor, start: int, stop: int) -> Tensor:
        rows = len(scores)
        count = round(sparsity * rows * stop) - round(sparsity * rows * start)
        return drop_lowest(scores.flatten(), count).reshape(scores.shape)

    return Rule(width, choose)


def per_row(sparsity: float, width: int = 128) -> Rule:
    """A share of every row, with the same cumulative budget in each."""

    def choose(scores: Tensor, start: int, stop: int) -> Tensor:
        count = round(sparsity * stop) - round(sparsity * start)
        return torch.stack([drop_lowest(row, count) for row in scores])

    return Rule(width, choose)


def n_of_m(n: int, m: int) -> Rule:
    """n kept of every m inputs of a row."""
    return Rule(m, lambda scores, start, stop: torch.stack([drop_lowest(row, m - n) for row in scores]))


def inverses(A_CC: Tensor) -> list[Tensor]:
    """For each column c the first row of the inverse of A[c:, c:]: the inverse once, then one elimination a column."""
    inverse, rows = torch.linalg.inv(A_CC), []
    while len(inverse):
        rows.append(inverse[0])
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return rows


def sparsegpt(W_RC: Tensor, H_CC: Tensor, rule: Rule, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """(Z, keep): Optimal Brain Surgeon from left to right; columns already passed are frozen."""
    W_RC, keep_RC = W_RC.double().clone(), torch.ones(W_RC.shape, dtype=torch.bool)
    dead_C = H_CC.diagonal() == 0
    rows = inverses(damp(H_CC, damping))
    for c, row in enumerate(rows):
        if c % rule.width == 0:
            stop = min(c + rule.width, len(rows))
            scores = W_RC[:, c:stop] ** 2 / torch.stack([rows[j][0] for j in range(c, stop)])
            scores[:, dead_C[c:stop]] = -torch.inf
            keep_RC[:, c:stop] = rule.choose(scores, c, stop)
        removed_R = torch.where(keep_RC[:, c], 0.0, W_RC[:, c])
        W_RC[:, c:] -= torch.outer(removed_R / row[0], row)
    return W_RC * keep_RC, keep_RC


def least_squares(W_RC: Tensor, A_CC: Tensor, keep_RC: Tensor) -> Tensor:
    """The best Z for a mask: in every row A_KK z = (w A)_K over its kept columns K."""
    W_RC, A_CC, Z_RC = W_RC.double(), A_CC.double(), torch.zeros(W_RC.shape, dtype=torch.float64)
    for row, keep_C in enumerate(keep_RC):
        Z_RC[row, keep_C] = torch.linalg.solve(A_CC[keep_C][:, keep_C], (W_RC[row] @ A_CC)[keep_C])
    return Z_RC


def brute_force(W_RC: Tensor, A_CC: Tensor, allowed: Callable[[Tensor], bool]) -> tuple[Tensor, Tensor, float]:
    """(Z, keep, loss) of the best of all allowed masks, each refitted exactly. For a dozen weights at most."""
    best = (W_RC, torch.ones(W_RC.shape, dtype=torch.bool), float("inf"))
    for bits in itertools.product((False, True), repeat=W_RC.numel()):
        keep_RC = torch.tensor(bits).reshape(W_RC.shape)
        if not allowed(keep_RC):
            continue
        Z_RC = least_squares(W_RC, A_CC, keep_RC)
        loss = quadratic_loss(W_RC, Z_RC, A_CC)
        if loss < best[2]:
            best = (Z_RC, keep_RC, loss)
    return best


def obs_sweep(w_C: Tensor, A_CC: Tensor) -> list[tuple[float, int]]:
    """(loss, column) of every removal from one row, each with the inverse of what is left, computed anew."""
    w_C, left, removals = w_C.clone(), list(range(len(w_C))), []
    while left:
        G = torch.linalg.inv(A_CC[left][:, left])
        costs = w_C[left] ** 2 / G.diagonal()
        p = int(costs.argmin())
        removals.append((float(costs[p]), left[p]))
        w_C[left] -= G[:, p] * (w_C[left[p]] / G[p, p])
        w_C[left[p]] = 0
        left.pop(p)
    return removals


def obc(W_RC: Tensor, A_CC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """ExactOBS with a budget over all rows: always the row whose next removal costs least; then a refit."""
    ahead = [obs_sweep(w_C, A_CC) for w_C in W_RC]
    keep_RC = torch.ones(W_RC.shape, dtype=torch.bool)
    for _ in range(count):
        row = min((r for r in range(len(ahead)) if ahead[r]), key=lambda r: ahead[r][0])
        keep_RC[row, ahead[row].pop(0)[1]] = False
    return least_squares(W_RC, A_CC, keep_RC), keep_RC


SMALL_ORACLE = Path(__file__).parent / "oracles/sparsegpt-small.safetensors"
SMALL_RULES = {"50": whole(0.5), "row-50": per_row(0.5), "2of4": n_of_m(2, 4)}


def small_oracle() -> dict[str, Tensor]:
    """A problem over two tiles, with dead columns, and the answers. `python tests/reference.py` writes it."""
    random = torch.Generator().manual_seed(0)
    mix_CC = torch.eye(140) + torch.randn(140, 140, generator=random) / 140**0.5
    x_TC = (torch.randn(200, 140, generator=random) @ mix_CC).double()
    x_TC[:, [3, 77, 139]] = 0
    W_RC = torch.randn(5, 140, generator=random).double()
    H_CC = x_TC.T @ x_TC
    return {"W": W_RC, "H": H_CC} | {name: sparsegpt(W_RC, H_CC, rule)[0] for name, rule in SMALL_RULES.items()}


if __name__ == "__main__":
    SMALL_ORACLE.parent.mkdir(exist_ok=True)
    save_file(small_oracle(), SMALL_ORACLE)
