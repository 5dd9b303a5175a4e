"""Methods on single layers: that they answer the same question at the same price, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors.torch import load_file
from torch import Tensor

from obsprune.core.cbs import Search
from obsprune.core.iobs import top_k
from obsprune.core.linalg import damped
from obsprune.core.patterns import NofM, Pattern, PerRow, Unstructured
from obsprune.core.statistics import Gram
from obsprune.errors import InputError
from obsprune.progress import Silent
from obsprune.report.figures import RIGHT, Curves
from obsprune.solvers import build
from obsprune.studies.layer_methods import METHODS, CombinatorialSurgery, HardThresholding, IteratedSurgeon
from obsprune.studies.layers import Comparison, Layers, Score, share_lost
from obsprune.studies.material import Material

SPARSEGPT = build("sparsegpt", {})


def problem(rows: int = 12, columns: int = 24, seed: int = 0) -> tuple[Tensor, Gram]:
    """A weight, and the Gram of correlated inputs, in float64."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    x_TC = torch.randn(200, columns, generator=random, dtype=torch.float64) @ mixed
    return torch.randn(rows, columns, generator=random, dtype=torch.float64), Gram.of(x_TC.T @ x_TC, 200)


def answers(name: str, patterns: Sequence[Pattern]) -> list[Tensor]:
    return [answer.weight for answer in METHODS[name].answers(*problem(), patterns)]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.55, 0.9])
@pytest.mark.parametrize("name", METHODS)
def test_all_have_as_many_zeros(name: str, sparsity: float) -> None:
    [Z_RC] = answers(name, [METHODS[name].share(sparsity)])
    by_row = name == "wanda"
    assert int((Z_RC == 0).sum()) == (12 * round(sparsity * 24) if by_row else round(sparsity * 12 * 24))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.grouped])
def test_n_of_m(name: str) -> None:
    [Z_RC] = answers(name, [NofM(2, 4)])
    assert bool(((Z_RC != 0).view(12, 6, 4).sum(2) == 2).all())


@pytest.mark.parametrize("name", METHODS)
def test_answers_are_those_to_each_pattern_alone(name: str) -> None:
    """ExactOBS's, too, which come from one sweep."""
    method = METHODS[name]
    patterns = [method.share(sparsity) for sparsity in (0.3, 0.8)]
    W_RC, gram = problem()
    for answer, pattern in zip(method.answers(W_RC, gram, patterns), patterns, strict=True):
        assert torch.equal(answer.weight, method.solver.solve(W_RC, method.solver.prepare(gram), pattern).weight)
        assert answer.seconds > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.8), PerRow(0.5), NofM(2, 4)])
def test_a_full_step_on_the_same_inputs_gives_one_shot_again(pattern: Pattern, seed: int) -> None:
    """Algorithms, section 4: the Newton point of a quadratic is W wherever one stands, so all rounds are one shot."""
    W_RC, gram = problem(seed=seed)
    surgeon = IteratedSurgeon(SPARSEGPT, steps=[1.0], rounds=3)
    state = surgeon.prepare(gram)
    first, *rounds = surgeon._iterates(W_RC, state, pattern)
    assert len(rounds) == 3
    for Z_RC, keep_RC in rounds:
        assert torch.equal(keep_RC, first[1])
        torch.testing.assert_close(Z_RC, first[0], rtol=1e-9, atol=1e-9)
    point_RC = W_RC.where(first[1], 0)  # Topk-I-OBS from anywhere is what is kept of W itself: magnitude pruning
    step_RC = (point_RC - W_RC) @ state.A_CC @ state.A_CC.inverse()
    survivors = int(first[1].sum())
    torch.testing.assert_close(top_k((point_RC - step_RC).flatten(), survivors), top_k(W_RC.flatten(), survivors))


def test_rounds_of_smaller_steps_by_definition() -> None:
    """Slowly: inverses, and the reference's SparseGPT."""
    W_RC, gram = problem()
    A_CC = reference.damp(gram.H_CC, 0.01)
    rule = reference.whole(0.6)
    Z_RC, _ = first_RC, _ = reference.sparsegpt(W_RC, gram.H_CC, rule)
    losses = [reference.quadratic_loss(W_RC, first_RC, gram.H_CC)]
    for _ in range(4):
        gradient_RC = (Z_RC - W_RC) @ A_CC
        Z_RC, _ = reference.sparsegpt(Z_RC - 0.3 * gradient_RC @ torch.linalg.inv(A_CC), gram.H_CC, rule)
        losses.append(reference.quadratic_loss(W_RC, Z_RC, gram.H_CC))
    surgeon = IteratedSurgeon(SPARSEGPT, steps=[0.3], rounds=4)
    found = surgeon.solve(W_RC, surgeon.prepare(gram), Unstructured(0.6))
    assert found.loss == pytest.approx(min(losses))
    assert found.loss <= SPARSEGPT.solve(W_RC, SPARSEGPT.prepare(gram), Unstructured(0.6)).loss


@pytest.mark.parametrize("seed", range(3))
def test_hard_thresholding_by_definition(seed: int) -> None:
    W_RC, gram = problem(seed=seed)
    A_CC = reference.damp(gram.H_CC, 0.01)
    scale_C = A_CC.diagonal().sqrt()
    N_CC, goal_RC, losses = A_CC / torch.outer(scale_C, scale_C), W_RC * scale_C, []
    Z_RC = top_k(goal_RC.flatten(), 100).view_as(W_RC)
    for _ in range(9):
        gradient_RC = (Z_RC - goal_RC) @ N_CC
        Z_RC = top_k((Z_RC - gradient_RC / torch.linalg.matrix_norm(N_CC, 2)).flatten(), 100).view_as(W_RC)
        losses.append(reference.quadratic_loss(W_RC, Z_RC / scale_C, A_CC))
    solver = HardThresholding(rounds=9)
    found = solver.solve(W_RC, solver.prepare(gram), Unstructured(1 - 100 / 288))
    torch.testing.assert_close(found.weight, Z_RC / scale_C)
    assert losses == sorted(losses, reverse=True)


def test_cbs_leaves_no_swap_that_wins() -> None:
    """Of any two weights: one comes back, another goes; E is the loss before the survivors move, by the damped Gram."""
    W_RC, gram = problem(3, 6)
    A_CC = damped(gram.H_CC, 0.01)
    surgery = CombinatorialSurgery(Search(candidates=18, tries=18, least=0.0))
    found = surgery.solve(W_RC, surgery.prepare(gram), Unstructured(0.5))
    best = reference.quadratic_loss(W_RC, W_RC * found.keep, A_CC)
    assert best < reference.quadratic_loss(W_RC, top_k(W_RC.flatten(), 9).view_as(W_RC), A_CC)
    for back in (~found.keep).flatten().nonzero()[:, 0].tolist():
        for away in found.keep.flatten().nonzero()[:, 0].tolist():
            swapped = found.keep.flatten().clone()
            swapped[back], swapped[away] = True, False
            assert reference.quadratic_loss(W_RC, W_RC * swapped.view_as(W_RC), A_CC) >= best * (1 - 1e-9)
    torch.testing.assert_close(found.weight, reference.least_squares(W_RC, A_CC, found.keep))


@pytest.mark.parametrize("pattern", [NofM(2, 4), PerRow(0.5)])
def test_cbs_refuses_patterns_it_would_break(pattern: Pattern) -> None:
    surgery = CombinatorialSurgery()
    W_RC, gram = problem()
    with pytest.raises(InputError, match="this pattern does not let it"):
        surgery.solve(W_RC, surgery.prepare(gram), pattern)


def test_errors_are_the_direct_formula_s() -> None:
    W_RC, x_TC = problem()[0], torch.randn(50, 24, dtype=torch.float64)
    Z_RC = W_RC * (W_RC > 0)
    expected = reference.direct_loss(W_RC, Z_RC, x_TC) / reference.direct_loss(W_RC, 0 * W_RC, x_TC)
    assert share_lost(W_RC, Z_RC, x_TC.T @ x_TC) == pytest.approx(expected)


def test_on_real_layers(oracles: Path) -> None:
    """Against the authors' SparseGPT results: our errors of them, and who is below them by how much."""
    stored = load_file(oracles / "deit-layers-sparsegpt.safetensors")
    W_RC, H_CC, theirs = (stored[f"blocks.4.mlp.fc1/{part}"] for part in ("W", "H", "70"))
    slow = reference.quadratic_loss(W_RC, theirs, H_CC) / reference.quadratic_loss(W_RC, 0 * W_RC, H_CC)
    assert share_lost(W_RC, theirs, H_CC) == pytest.approx(slow, rel=1e-4)
    over = {
        name: share_lost(W_RC, METHODS[name].answers(W_RC, Gram.of(H_CC, 1), [Unstructured(0.7)])[0].weight, H_CC)
        / slow
        for name in ("sparsegpt", "sparsegpt-refit", "admm", "magnitude")
    }
    assert over["sparsegpt"] == pytest.approx(1, abs=0.01)
    assert 0.77 <= over["sparsegpt-refit"] <= 0.88 and 0.63 <= over["admm"] <= 0.8 and over["magnitude"] > 1.3


def test_what_is_read_off() -> None:
    found = Comparison(["a", "b"], {"0.5": 0.5})
    for name, pair in (("sparsegpt", (0.1, 0.4)), ("admm", (0.05, 0.4))):
        for error in pair:
            found.add(name, "0.5", Score(error, 2 * error, 0.25))
            found.add(name, "2:4", Score(3 * error, 4 * error, 0.5))
    found.add("cbs", "0.5", Score(0.1, 0.1, 1.0))
    found.add("cbs", "0.5", Score(0.2, 0.1, 2.0))
    values = found.values()
    assert values["admm.0.5"] == pytest.approx(0.225) and values["admm.heldout.2:4"] == pytest.approx(0.9)
    assert [values[f"admm.ratio{part}.0.5"] for part in ("", ".least", ".most")] == pytest.approx([0.75, 0.5, 1.0])
    assert values["cbs.seconds"] == 1.5 and values["sparsegpt.seconds"] == 0.25
    errors, *_, by_layer = found.tables("0.5")
    assert list(errors.columns) == ["method", "0.5", "2:4"]
    assert errors.rows[2][2] == "–" and list(by_layer.columns) == ["layer", "sparsegpt", "admm", "cbs"]
    assert list(by_layer.rows) == [["a", 1.0, 0.5, 1.0], ["b", 1.0, 1.0, 0.5]]
    panels = found.figure().panels
    assert all(isinstance(one, Curves) and [line.x for line in one.lines.values()] == [[0.5]] * 3 for one in panels)
    assert [one.legend for one in panels] == [None, None, RIGHT]  # type: ignore[attr-defined]


def test_a_run_repeats_itself_and_says_what_it_saw(assets: Path) -> None:
    study = Layers(
        layers=[r"layers\.1\..*(q_proj|down_proj)"], methods=["wanda", "sparsegpt", "admm"], sparsities=[0.5, 0.7],
        weights=2000, calibration=4, judged=4, seqlen=64, batch=2,
    )  # fmt: skip
    first, second = (study.run(Material(assets), Silent()) for _ in range(2))
    without_times = [
        {name: value for name, value in one.values.items() if "seconds" not in name} for one in (first, second)
    ]
    assert without_times[0] == without_times[1]
    assert first.facts["layers"].endswith("q_proj (31, 64), model.layers.1.mlp.down_proj (11, 172)")
    assert first.values["admm.0.5"] < first.values["sparsegpt.0.5"] < first.values["wanda.0.5"]
    assert first.values["admm.heldout.0.5"] > first.values["admm.0.5"]
    assert dict(first.facts)["seen"] == "4 sequences of 64 tokens, 256 tokens"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": ["sparsegpt", "amdm"]}, "did you mean admm"),
        ({"layers": ["query"]}, "no matrix of stories260k is called query"),
        ({"groups": ["2/4"]}, "unknown pattern '2/4'"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], says: str, assets: Path) -> None:
    small = Layers(layers=[r"layers\.0\..*q_proj"], weights=64, calibration=2, judged=2, seqlen=32)
    with pytest.raises(InputError, match=says):
        replace(small, **changes).run(Material(assets), Silent())


def test_a_model_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stories260k/config\.json"):
        Layers().require(Material(tmp_path))
