"""The empirical Fisher by blocks, against dense matrices and the optimality system."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obsprune.core.fisher import Fisher, Layout, WoodFisher, keep_best, root_of

DAMPING = 1e-2
LAYOUTS = [Layout([12], 12), Layout([7, 5], 4), Layout([8, 4], 2), Layout([5, 7], 100)]
"""One block; rests at the ends; all blocks alike; a block for each matrix."""
COUNTS = [3, 12, 40]
"""Fewer gradients than weights of a block, as many, more."""


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(G: Tensor, layout: Layout, damping: float = DAMPING) -> Tensor:
    """F as the definition says it: one outer product after the other, zero between blocks, which are counted here."""
    total = torch.zeros(12, 12, dtype=torch.float64)
    for g in G:
        total += torch.outer(g, g) / len(G)
    number, numbers = 0, []
    for size in layout.sizes:
        for start in range(0, size, layout.width):
            numbers += [number] * min(layout.width, size - start)
            number += 1
    block = torch.tensor(numbers)
    return total * (block[:, None] == block) + damping * G.square().mean() * torch.eye(12)


def least(F: Tensor, w: Tensor, keep: Tensor) -> Tensor:
    """The minimiser of ½ δᵀFδ with w + δ = 0 where nothing is kept, by Lagrange's multipliers: no formula of ours."""
    E = torch.eye(12, dtype=torch.float64)[:, ~keep]
    system = torch.cat([torch.cat([F, E], 1), torch.cat([E.T, torch.zeros(E.shape[1], E.shape[1])], 1)])
    right = torch.cat([torch.zeros(12), -w[~keep]]).double()
    return w + torch.linalg.solve(system, right)[:12]


@pytest.fixture(params=COUNTS)
def G(request: pytest.FixtureRequest) -> Tensor:
    return rand(request.param, 12) + 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
class TestAgainstDense:
    def test_the_root_has_the_gram(self, G: Tensor, layout: Layout) -> None:
        fisher, F = Fisher.of(G, DAMPING, layout), dense(G, layout)
        columns = [fisher.product(e) for e in torch.eye(12, dtype=torch.float64)]
        torch.testing.assert_close(torch.stack(columns), F)
        torch.testing.assert_close(fisher.diagonal(), F.diagonal())
        assert len(root_of(G, layout)) == min(len(G), layout.width)

    def test_the_inverse(self, G: Tensor, layout: Layout) -> None:
        found = Fisher.of(G, DAMPING, layout).inverse_diagonal()
        torch.testing.assert_close(found, torch.linalg.inv(dense(G, layout)).diagonal())

    def test_the_saliency_is_the_least_increase(self, G: Tensor, layout: Layout) -> None:
        w, F = rand(12, seed=1), dense(G, layout)
        found = Fisher.of(G, DAMPING, layout).saliency(w)
        for q in range(12):
            keep = torch.arange(12) != q
            change = least(F, w, keep) - w
            assert float(found[q]) == pytest.approx(float(change @ F @ change / 2))

    def test_the_joint_update_is_the_minimiser(self, G: Tensor, layout: Layout) -> None:
        w, F = rand(12, seed=1), dense(G, layout)
        for seed in range(4):
            keep = rand(12, seed=seed) > 0
            found = Fisher.of(G, DAMPING, layout).joint_update(w, keep)
            assert not found[~keep].any()
            torch.testing.assert_close(found, least(F, w, keep))
            inverse, gone = torch.linalg.inv(F), (~keep).nonzero()[:, 0]  # as Optimal Brain Surgeon writes it
            step = inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], w[gone])
            torch.testing.assert_close(found, w - step)

    def test_the_published_update(self, G: Tensor, layout: Layout) -> None:
        w, keep, inverse = rand(12, seed=1), rand(12, seed=2) > 0, torch.linalg.inv(dense(G, layout))
        found = Fisher.of(G, DAMPING, layout).separate_update(w, keep)
        alone = sum(w[q] / inverse[q, q] * inverse[:, q] for q in (~keep).nonzero()[:, 0].tolist())
        torch.testing.assert_close(found, (w - alone) * keep)

    def test_one_weight_alone_is_moved_alike_by_both(self, G: Tensor, layout: Layout) -> None:
        w, keep, fisher = rand(12, seed=1), torch.arange(12) != 4, Fisher.of(G, DAMPING, layout)
        torch.testing.assert_close(fisher.joint_update(w, keep), fisher.separate_update(w, keep))


def test_float32_gradients_give_what_float64_ones_do() -> None:
    G, w, keep = rand(40, 12), rand(12, seed=1), rand(12, seed=2) > 0
    exact, rounded = (Fisher.of(x, 1e-4, Layout([12], 12)) for x in (G, G.float()))
    torch.testing.assert_close(rounded.inverse_diagonal(), exact.inverse_diagonal().float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(rounded.joint_update(w.float(), keep), exact.joint_update(w, keep).float())


def test_weights_without_a_gradient_go_by_magnitude() -> None:
    w = rand(12, seed=1)
    found, keep = WoodFisher().operate(w, torch.zeros(3, 12).double(), [12], torch.ones(12, dtype=torch.bool), 5)
    assert torch.equal(~keep, w.abs() < w.abs().sort().values[5])
    assert torch.equal(found, w * keep)


def test_runs_cover_every_weight_once_however_little_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (1, 100, 10**6):
        monkeypatch.setattr("obsprune.core.fisher.CHUNK_BYTES", most)
        for layout in LAYOUTS:
            places = torch.cat([torch.arange(12)[part] for part, _ in layout.runs(3)])
            assert torch.equal(places, torch.arange(12))
            assert all((part.stop - part.start) % width == 0 for part, width in layout.runs(3))
    assert Layout([7, 5], 4).blocks().tolist() == [0] * 4 + [1] * 3 + [2] * 4 + [3]


def test_what_is_gone_goes_first_then_what_is_zero() -> None:
    scores, w = torch.tensor([0.5, 3.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    before = torch.tensor([True, True, True, False])
    order = [keep_best(scores, w, before, count).tolist() for count in range(5)]
    assert order == [
        [True, True, True, True],
        [True, True, True, False],
        [True, False, True, False],
        [False, False, True, False],
        [False, False, False, False],
    ]


def test_woodfisher_removes_what_costs_least_and_lets_the_others_answer() -> None:
    G, w, layout = rand(40, 12) + 0.5, rand(12, seed=1), Layout([7, 5], 4)
    found, keep = WoodFisher(DAMPING, 4).operate(w, G, [7, 5], torch.ones(12, dtype=torch.bool), 6)
    saliency = w.square() / (2 * torch.linalg.inv(dense(G, layout)).diagonal())
    assert torch.equal(~keep, saliency < saliency.sort().values[6])
    torch.testing.assert_close(found, least(dense(G, layout), w, keep))
    published, same = WoodFisher(DAMPING, 4, Fisher.separate_update).operate(w, G, [7, 5], torch.ones_like(keep), 6)
    assert torch.equal(same, keep) and not torch.allclose(published, found)
