"""SparseGPT against the authors' own code on real layers of DeiT-tiny (OBSPRUNE_ORACLES).

That code prunes int(s·n) + 1 of the n weights of a tile, one too many; we prune the exact number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file
from torch import Tensor

from obsprune.core.patterns import NofM, Pattern, PerRow, Unstructured, prune_lowest
from obsprune.core.statistics import Gram
from obsprune.solvers import build
from obsprune.solvers.base import Solution

LAYERS = ["blocks.4.mlp.fc1", "blocks.7.mlp.fc2"]
SHARES = [("50", 0.5), ("70", 0.7)]


@dataclass(frozen=True)
class OneTooMany(Pattern):
    """The authors' count: int(s·n) + 1 of every tile of n weights."""

    sparsity: float

    def keep(self, scores_RC: Tensor) -> Tensor:
        count = int(self.sparsity * scores_RC.numel()) + 1
        return prune_lowest(scores_RC.reshape(1, -1), count).view_as(scores_RC)

    def tile(self, rows: int, start: int, stop: int) -> Pattern:
        return self

    def may_prune(self, keep_RC: Tensor, rows: slice = slice(None)) -> Tensor:
        raise NotImplementedError

    def pruned(self, rows: int, columns: int) -> int:
        raise NotImplementedError

    def check(self, rows: int, columns: int) -> None: ...


@pytest.fixture(scope="module")
def layers(oracles: Path) -> dict[str, Tensor]:
    return load_file(oracles / "deit-layers-sparsegpt.safetensors")


def solved(layers: dict[str, Tensor], layer: str, pattern: Pattern, name: str = "sparsegpt") -> Solution:
    solver = build(name, {})
    return solver.solve(layers[f"{layer}/W"], solver.prepare(Gram.of(layers[f"{layer}/H"], 1, layer)), pattern)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("label", "share"), SHARES)
def test_with_the_authors_count_the_answer_is_theirs(
    layers: dict[str, Tensor], layer: str, label: str, share: float
) -> None:
    answer, theirs = solved(layers, layer, OneTooMany(share)), layers[f"{layer}/{label}"]
    assert torch.equal(answer.weight != 0, theirs != 0)
    assert distance(answer.weight, theirs) < 1e-5


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("label", "pattern"), [("2of4", NofM(2, 4)), ("4of8", NofM(4, 8))])
def test_n_of_m_is_theirs(layers: dict[str, Tensor], layer: str, label: str, pattern: Pattern) -> None:
    answer, theirs = solved(layers, layer, pattern), layers[f"{layer}/{label}"]
    assert torch.equal(answer.weight != 0, theirs != 0)
    assert distance(answer.weight, theirs) < 1e-5


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("label", "share"), SHARES)
def test_the_exact_count_moves_little(layers: dict[str, Tensor], layer: str, label: str, share: float) -> None:
    answer, theirs = solved(layers, layer, Unstructured(share)), layers[f"{layer}/{label}"]
    tiles = layers[f"{layer}/W"].shape[1] / 128
    assert int((answer.weight == 0).sum()) == round(share * theirs.numel())
    assert 0 < int((theirs == 0).sum()) - int((answer.weight == 0).sum()) <= tiles + 1
    assert float(((answer.weight != 0) != (theirs != 0)).float().mean()) < 5e-4
    assert distance(answer.weight, theirs) < 0.03


LOWER = {"50": (Unstructured(0.5), 0.33, 0.20), "70": (Unstructured(0.7), 0.31, 0.20), "2of4": (NofM(2, 4), 0.26, 0.18)}
"""How much lower than SparseGPT's ADMM's layer error must be, on fc1 and fc2: algorithms, section 5."""


@pytest.mark.parametrize("label", LOWER)
def test_admm_is_as_far_below_sparsegpt_as_was_measured(layers: dict[str, Tensor], label: str) -> None:
    pattern, *least = LOWER[label]
    for layer, share in zip(LAYERS, least, strict=True):
        one, other = (solved(layers, layer, pattern, name).loss for name in ("admm", "sparsegpt"))
        assert one <= (1 - share) * other, (layer, 1 - one / other)


SMALL = {"50": Unstructured(0.5), "row-50": PerRow(0.5), "2of4": NofM(2, 4)}


@pytest.mark.parametrize("name", SMALL)
def test_the_committed_small_oracle(name: str) -> None:
    """Runs without OBSPRUNE_ORACLES: results of reference.py, stored once, so that a change of both would show."""
    stored = load_file(reference.SMALL_ORACLE)
    torch.testing.assert_close(reference.small_oracle()[name], stored[name], rtol=1e-9, atol=1e-12)
    solver = build("sparsegpt", {})
    answer = solver.solve(stored["W"], solver.prepare(Gram.of(stored["H"], 200)), SMALL[name])
    assert torch.equal(answer.keep, stored[name] != 0)
    torch.testing.assert_close(answer.weight, stored[name], rtol=1e-9, atol=1e-12)
