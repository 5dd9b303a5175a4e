"""The Combinatorial Brain Surgeon against every mask there is, at small size."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from torch import Tensor

from obsprune.core.cbs import Candidates, CombinatorialSurgeon, Search, flip_costs, objective
from obsprune.core.fisher import Fisher, Layout, keep_best

SIZE, REMOVED = 10, 5
LAYOUTS = [Layout([10], 10), Layout([6, 4], 3)]
EXACT = Search(least=0.0)
ALL = torch.ones(SIZE, dtype=torch.bool)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(layout: Layout, seed: int, samples: int = 4) -> tuple[Fisher, Tensor]:
    return Fisher.of(rand(samples, SIZE, seed=seed), 1e-2, layout), rand(SIZE, seed=1000 + seed)


def dense(fisher: Fisher) -> Tensor:
    return torch.stack([fisher.product(e) for e in torch.eye(SIZE, dtype=torch.float64)])


def masks() -> Iterator[Tensor]:
    for gone in combinations(range(SIZE), REMOVED):
        keep = ALL.clone()
        keep[list(gone)] = False
        yield keep


def magnitude(w: Tensor) -> Tensor:
    return keep_best(w.abs(), w, ALL, REMOVED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_objective_is_the_quadratic_form(layout: Layout) -> None:
    fisher, w = problem(layout, 0)
    F = dense(fisher)
    for keep in masks():
        y = (~keep).double()
        brute = sum(w[i] * y[i] * F[i, j] * w[j] * y[j] for i in range(SIZE) for j in range(SIZE)) / 2
        assert objective(fisher, w, keep) == pytest.approx(float(brute))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cost_of_a_flip_is_the_difference(layout: Layout) -> None:
    fisher, w = problem(layout, 1)
    for keep in list(masks())[::20]:
        costs = flip_costs(fisher, w, keep)
        for k in range(SIZE):
            other = keep ^ (torch.arange(SIZE) == k)
            assert float(costs[k]) == pytest.approx(objective(fisher, w, other) - objective(fisher, w, keep))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_costs_stay_right_while_weights_are_flipped(layout: Layout) -> None:
    fisher, w = problem(layout, 2)
    keep = magnitude(w)
    index = torch.cat([(~keep).nonzero()[:, 0], keep.nonzero()[:, 0]])
    V = (fisher.S_MP[:, index] * torch.where(keep, w, -w)[index]).T
    candidates, costs = Candidates(V, layout.blocks()[index], REMOVED), flip_costs(fisher, w, keep)[index]
    for place in (0, 7, 3):
        costs = candidates.flipped(costs, place)
        keep[index[place]] = ~keep[index[place]]
        free = costs.isfinite()
        torch.testing.assert_close(costs[free], flip_costs(fisher, w, keep)[index][free])
    assert int((~costs.isfinite()).sum()) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("candidates", [1, 3, 100])
def test_swaps_keep_the_count_and_never_raise_the_objective(layout: Layout, candidates: int) -> None:
    for seed in range(20):
        fisher, w = problem(layout, seed)
        start = magnitude(w)
        found = Search(candidates, least=0.0).improve(fisher, w, start)
        assert int((~found).sum()) == REMOVED
        assert objective(fisher, w, found) <= objective(fisher, w, start) * (1 + 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_best_of_all_masks(layout: Layout) -> None:
    """In most of thirty problems the search ends at the best mask of all 252; magnitude in few."""
    reached, started = 0, 0
    for seed in range(30):
        fisher, w = problem(layout, seed)
        best = min(objective(fisher, w, keep) for keep in masks())
        start, found = magnitude(w), EXACT.improve(fisher, w, magnitude(w))
        value = objective(fisher, w, found)
        assert value >= best - 1e-12
        reached += value <= best * (1 + 1e-9)
        started += objective(fisher, w, start) <= best * (1 + 1e-9)
    assert reached >= 20 and started < 10


def test_two_weights_that_cancel_go_together() -> None:
    """The smallest weight alone matters; two large ones with opposite effects do not, together."""
    G = torch.tensor([[1.0, 1.0, 1.0, 0.5]]).double()
    w = torch.tensor([2.0, -2.0, 1.0, 1.5]).double()
    keep = CombinatorialSurgeon(1e-6, 4, update=False).operate(w, G, [4], torch.ones(4, dtype=torch.bool), 2)[1]
    assert keep.tolist() == [False, False, True, True]


def test_the_update_is_the_constrained_minimum() -> None:
    for seed in range(5):
        G, w = rand(6, SIZE, seed=seed), rand(SIZE, seed=50 + seed)
        bare, keep = CombinatorialSurgeon(1e-2, 5, update=False).operate(w, G, [6, 4], ALL, REMOVED)
        moved, same = CombinatorialSurgeon(1e-2, 5).operate(w, G, [6, 4], ALL, REMOVED)
        F = dense(Fisher.of(G, 1e-2, Layout([6, 4], 5)))
        assert torch.equal(keep, same) and torch.equal(bare, w * keep)
        exact = torch.zeros(SIZE).double()
        exact[keep] = w[keep] + torch.linalg.solve(F[keep][:, keep], F[keep][:, ~keep] @ w[~keep])
        torch.testing.assert_close(moved, exact)
        raised = [float((z - w) @ F @ (z - w)) for z in (moved, bare)]
        assert raised[0] < raised[1]


def test_zeros_and_what_is_gone_stay_gone() -> None:
    w, before = rand(SIZE, seed=3), ALL.clone()
    w[:3], before[0] = 0.0, False
    for count in (1, 3, 6, SIZE):
        found, keep = CombinatorialSurgeon(1e-2, 5).operate(w, rand(6, SIZE), [SIZE], before, count)
        assert int((~keep).sum()) == count and not keep[0]
        assert count < 3 or not keep[:3].any()
        assert not found[~keep].any()


def test_nothing_or_everything_to_remove() -> None:
    w, G = rand(SIZE), rand(6, SIZE)
    whole, keep = CombinatorialSurgeon().operate(w, G, [SIZE], ALL, 0)
    assert keep.all() and torch.equal(whole, w)
    nothing, keep = CombinatorialSurgeon().operate(w, G, [SIZE], ALL, SIZE)
    assert not keep.any() and not nothing.any()
