"""Sharing out a budget, against brute force and by its bounds."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from obsprune.core.allocation import CAP, SPREAD, by_importance, counts, knapsack, levels_around, outlier_share, owl
from obsprune.core.statistics import Gram


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_exact_and_near(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 500, (7,), generator=random).tolist()
    shares = torch.rand(7, generator=random).tolist()
    budget = round(0.6 * sum(sizes))
    zeros = counts(shares, sizes, budget)
    assert sum(zeros) == budget
    assert all(0 <= zero <= size for zero, size in zip(zeros, sizes, strict=True))
    inside = [(z / n - s, n) for z, n, s in zip(zeros, sizes, shares, strict=True) if 0 < z < int(CAP * n)]
    for (one, n), (other, m) in product(inside, inside):  # all that are not at a bound moved by the same amount
        assert abs(one - other) <= 1 / n + 1 / m


def test_counts_of_uniform_shares_are_those_of_the_pattern_and_ties_go_by_index() -> None:
    assert counts([0.5, 0.5, 0.5], [10, 20, 30], 30) == [5, 10, 15]
    assert counts([0.5, 0.5, 0.5], [3, 3, 3], 4) == [2, 1, 1]
    assert counts([0.9, 0.99], [100, 100], 198) == [99, 99]
    assert counts([0.5, 0.5, 0.1], [10, 1000, 200], 1208) == [10, 998, 200]  # beyond CAP all share what is asked


def test_levels_are_distinct_and_hold_the_target() -> None:
    for sparsity in (0.0, 0.1, 0.5, 0.7, 0.89, 0.9, 0.95, 0.99, 0.995):
        levels = levels_around(sparsity)
        assert sparsity in levels and all(a < b for a, b in pairwise(levels))
        assert levels[0] >= 0 and levels[-1] <= max(CAP, sparsity)


def test_outliers_are_counted_over_the_whole_block() -> None:
    plain, wild = torch.ones(4, 5), torch.ones(4, 5)
    wild[0, 0] = 100.0
    gram = Gram.of(torch.eye(5), 5)
    assert outlier_share([(plain, gram), (wild, gram)]) == 1 / 40
    loud = Gram.of(torch.diag(torch.tensor([1e4, 1.0, 1.0, 1.0, 1.0])), 5)  # ‖X‖ of the first input is 100
    assert outlier_share([(plain, loud), (plain, gram)]) == 4 / 40


def test_owl_spares_blocks_with_outliers_within_its_spread() -> None:
    shares = owl([0.03, 0.01, 0.02], 0.7)
    assert shares[0] < shares[2] < shares[1]
    assert max(shares) - min(shares) == pytest.approx(2 * SPREAD)
    assert sum(shares) / 3 == pytest.approx(0.7)
    assert owl([0.02, 0.02], 0.7) == [0.7, 0.7]


def test_importance_is_one_minus_the_share_of_the_error() -> None:
    assert by_importance([1.0, 1.0, 2.0], 0.6) == pytest.approx([0.6 * 9 / 8, 0.6 * 9 / 8, 0.6 * 6 / 8])
    assert by_importance([0.0, 0.0], 0.6) == [0.6, 0.6]
    assert by_importance([3.0], 0.6) == [0.6]


LEVELS = [0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize("seed", range(10))
def test_knapsack_is_brute_force_on_convex_errors(seed: int) -> None:
    """Sizes alike, so that a whole number of steps meets the budget: then the best is among the levels."""
    random = torch.Generator().manual_seed(seed)
    errors = torch.rand(4, 5, generator=random).sort(dim=1).values.cumsum(1).tolist()
    sizes, budget = [100] * 4, 280
    found = knapsack(errors, LEVELS, sizes, budget)
    assert sum(100 * share for share in found) == pytest.approx(budget)

    def cost(choice: tuple[int, ...]) -> float:
        return sum(row[level] for row, level in zip(errors, choice, strict=True))

    allowed = [
        c for c in product(range(5), repeat=4) if sum(100 * LEVELS[level] for level in c) == pytest.approx(budget)
    ]
    best = min(allowed, key=cost)
    assert found == pytest.approx([LEVELS[level] for level in best])


def test_knapsack_counts_zeros_not_matrices_and_looks_past_a_dent() -> None:
    dear_and_large = knapsack([[0, 1.0], [0, 1.5]], [0.0, 1.0], [100, 200], 200)
    assert dear_and_large == pytest.approx([0.0, 1.0])  # 1.5 for 200 zeros is cheaper than 1 for 100
    dented = knapsack([[0, 3.0, 3.1], [0, 1.6, 3.2]], [0.0, 0.5, 1.0], [10, 10], 10)
    assert dented == pytest.approx([1.0, 0.0])
