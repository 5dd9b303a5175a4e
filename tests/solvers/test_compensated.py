"""The bias takes the lost mean: against least squares with an intercept, and in real layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from zoo import Zoo, reference, token_rows

from obsprune.core.patterns import Given, NofM, Pattern, Unstructured
from obsprune.core.statistics import Gram
from obsprune.engine.layerwise import Projection, project_blocks
from obsprune.engine.place import Dense, OnDevice
from obsprune.engine.steps import Between
from obsprune.engine.teacher import teach
from obsprune.models.load import load
from obsprune.models.text import TokenSamples
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe
from obsprune.solvers import SOLVERS, build


def problem() -> tuple[Tensor, Tensor]:
    """(W, x_TC) with inputs far from mean zero, as after a ReLU."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(6, 16, generator=random), torch.randn(400, 16, generator=random).relu() + 0.5


def gram_of(x_TC: Tensor) -> Gram:
    gram = Gram(x_TC.shape[1])
    gram.add(x_TC)
    return gram


def exact_gram_of(x_TC: Tensor) -> Gram:
    x_TC = x_TC.double()
    return Gram.of(x_TC.T @ x_TC, len(x_TC), sum_C=x_TC.sum(0))


def lost(W_RC: Tensor, Z_RC: Tensor, b_R: Tensor, x_TC: Tensor) -> float:
    return float((x_TC.double() @ (W_RC - Z_RC).double().T - b_R.double()).square().sum())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=["50%", "2:4"])
def test_loss_is_what_is_left_and_less_than_without(name: str, pattern: Pattern) -> None:
    W_RC, x_TC = problem()
    solver, plain = build(name, {"compensate": True}), build(name, {})
    with_bias = solver.solve(W_RC, solver.prepare(gram_of(x_TC)), pattern)
    without = plain.solve(W_RC, plain.prepare(gram_of(x_TC)), pattern)
    assert with_bias.bias_shift is not None and without.bias_shift is None
    assert with_bias.loss == pytest.approx(lost(W_RC, with_bias.weight, with_bias.bias_shift, x_TC), rel=1e-4)
    assert with_bias.loss < without.loss
    for nudge in (0.01, -0.01):  # the shift is the best one for this weight
        assert lost(W_RC, with_bias.weight, with_bias.bias_shift + nudge, x_TC) > with_bias.loss


def test_an_exact_refit_with_a_bias_is_least_squares_with_an_intercept() -> None:
    W_RC, x_TC = problem()
    keep_RC = torch.rand(W_RC.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    solver = build("magnitude", {"exact": True, "compensate": True})
    gram = exact_gram_of(x_TC)
    answer = solver.solve(W_RC.double(), solver.prepare(gram), Given(keep_RC))
    ridge = 0.01 * float(gram.centred().H_CC.diagonal().mean())
    ones = torch.ones(len(x_TC), 1).double()
    for row, keep_C in enumerate(keep_RC):
        design = torch.cat([x_TC.double()[:, keep_C], ones], 1)
        penalty = ridge * torch.eye(design.shape[1]).double()
        penalty[-1, -1] = 0
        # the ridge pulls toward the dense weights, not toward zero
        dense = torch.cat([W_RC.double()[row, keep_C], torch.zeros(1).double()])
        target = x_TC.double() @ W_RC.double()[row]
        solution = torch.linalg.solve(design.T @ design + penalty, design.T @ target + penalty @ dense)
        torch.testing.assert_close(answer.weight[row, keep_C], solution[:-1], rtol=1e-6, atol=1e-6)
        assert float(answer.bias_shift[row]) == pytest.approx(float(solution[-1]), abs=1e-5)


def test_a_constant_input_is_dead_to_the_inner_solver_and_goes_into_the_bias() -> None:
    W_RC, x_TC = problem()
    x_TC[:, 3] = 7.0
    solver = build("sparsegpt", {"compensate": True})
    answer = solver.solve(W_RC, solver.prepare(gram_of(x_TC)), Unstructured(0.25))
    assert not bool(answer.keep[:, 3].any())
    assert bool((gram_of(x_TC).centred().H_CC[3] == 0).all())


def test_centred_is_the_gram_of_centred_inputs() -> None:
    x_TC = problem()[1] + 100.0  # far away: a difference of large sums
    expected = x_TC.double() - x_TC.double().mean(0)
    gram = exact_gram_of(x_TC)
    torch.testing.assert_close(gram.centred().H_CC, expected.T @ expected, rtol=1e-6, atol=1e-6)
    assert not bool(gram.centred().mean_C.any())
    torch.testing.assert_close(gram.double().mean_C, x_TC.double().mean(0))


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2", "llama"])
@pytest.mark.parametrize("iters", [1, 2])
def test_only_biases_that_exist_are_moved(zoo: Zoo, tokens: Path, tmp_path: Path, family: str, iters: int) -> None:
    data = {"dataset": str(tokens), "nsamples": 12, "seqlen": 32, "heldout": 4}
    tree = {"model": {"name": str(zoo(family))}, "data": data, "evaluation": ["none"], "iters": iters,
            "solver": {"name": "sparsegpt", "compensate": True}, "rounds": {"steps": 4}}  # fmt: skip
    report = prune(make_recipe(tree), tmp_path / "out", Silent())
    before, after = reference(zoo(family)).state_dict(), reference(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    pruned = {matrix["name"] for matrix in report["matrices"]}
    biases = {f"{name}.bias" for name in pruned} & before.keys()
    assert bool(biases) == (family != "llama")
    for name, tensor in before.items():
        changed = not torch.equal(tensor, after[name])
        assert changed == (name in biases or name.removesuffix(".weight") in pruned), name
    assert all(matrix["loss"] >= 0 for matrix in report["matrices"])


def test_a_local_step_to_the_dense_weights_is_one_shot_over_again(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    """Biases go the same way as weights: compensated twice, they would be counted twice."""
    model, rows = load(str(zoo("gpt2"))), TokenSamples(token_rows(8))
    solver = build("sparsegpt", {"compensate": True})
    projection = Projection(solver, {matrix.name: Unstructured(0.5) for matrix in model.matrices})
    place = OnDevice(model)
    with place.opened():
        lesson = teach(place, rows, 4)
        once, twice = place.store("once"), place.store("twice")
        project_blocks(place, lesson.batches, projection, once, Dense())
        project_blocks(place, lesson.batches, projection, twice, Between(once, 1.0))
        for block in model.blocks:
            dense = block.weights()
            for name, tensor in once.get(block).items():
                assert torch.equal(tensor, twice.get(block)[name])
            for bias in (f"{matrix.name}.bias" for matrix in block.matrices):
                assert not torch.equal(once.get(block)[bias], dense[bias])


def test_the_reported_loss_counts_the_bias(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    data = {"dataset": str(tokens), "nsamples": 12, "seqlen": 32, "heldout": 4}
    tree = {"model": {"name": str(zoo("gpt2"))}, "data": data, "evaluation": ["none"], "sparsity": 0.7}
    losses = {}
    for compensate in (False, True):
        recipe = make_recipe(tree, {"solver": {"name": "sparsegpt", "compensate": compensate}})
        report = prune(recipe, tmp_path / f"out-{compensate}", Silent())
        losses[compensate] = report["matrices"][0]["loss"]
    assert losses[True] < losses[False]
    out = load_file(next(iter((tmp_path / "out-True").glob("model-00002*.safetensors"))))
    assert any(key.endswith("attn.c_attn.bias") for key in out)
