"""Mixtures of experts from checkpoint to sparse checkpoint, in every way there is to prune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner
from zoo import MIXTURES, Zoo, logits, reference, shards, tensors, token_batches

from obsprune.cli import app
from obsprune.engine import rounds as rounds_module
from obsprune.engine.rundir import RunDir
from obsprune.errors import InputError
from obsprune.models.load import load
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe


def pruned(source: Path, tokens: Path, output: Path, **settings: Any) -> dict[str, Any]:
    data = {"dataset": str(tokens), "nsamples": 12, "seqlen": 32, "heldout": 6}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["heldout"], "rounds": {"steps": 4}}
    return prune(make_recipe(tree, settings), output, Silent())


def weights(directory: Path) -> dict[str, Tensor]:
    """{matrix: weight [R, C]} as stored."""
    blocks = load(str(directory)).blocks
    return {matrix.name: block.weights()[matrix.name] for block in blocks for matrix in block.matrices}


def check(source: Path, output: Path, tuned: bool = False) -> None:
    """The same tensors under the same names; nothing changed but what was to be pruned (and, when blocks are tuned,
    their vectors); transformers reads it so.
    """
    before, after, model = tensors(source), tensors(output), load(str(source))
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    pruned_keys = {key for matrix in model.matrices for key in model.names.sources[matrix.parameter]}
    vectors = {key for key, tensor in before.items() if tuned and ".layers." in key and tensor.dim() == 1}
    assert {key for key in before if not torch.equal(before[key], after[key])} <= pruned_keys | vectors
    batch, ours = token_batches(1)[0], load(str(output))
    with ours.lazily_loaded():
        assert torch.equal(logits(ours.network, batch), logits(reference(output), batch))


@pytest.mark.parametrize("family", MIXTURES)
def test_two_of_four_in_every_expert(zoo: Zoo, tokens: Path, tmp_path: Path, family: str) -> None:
    source, output = zoo(family), tmp_path / "out"
    report = pruned(source, tokens, output, pattern="2:4")
    check(source, output)
    found = weights(output)
    if MIXTURES[family].layers:
        assert sorted(found) == sorted(MIXTURES[family].matrices)
    for name, weight in found.items():
        groups = (weight != 0).reshape(len(weight), -1, 4).sum(-1)
        assert bool((groups == 2).all()), name
    assert report["sparsity"]["reached"] == 0.5
    assert [entry["layer"] for entry in report["coverage"]] == [
        experts.layer for block in load(str(source)).blocks for experts in block.experts
    ]
    assert report["evaluation"]["heldout"]["pruned"]["perplexity"] > 0


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_zeros_are_where_transformers_multiplies(zoo: Zoo, tokens: Path, tmp_path: Path, family: str) -> None:
    """2:4 along the inputs in transformers' own parameters, whichever way round they lie."""
    pruned(zoo(family), tokens, tmp_path / "out", pattern="2:4")
    model = reference(tmp_path / "out")
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            inputs_last = parameter.transpose(1, 2) if family == "gpt_oss" else parameter
            assert bool(((inputs_last != 0).reshape(-1, 4).sum(-1) == 2).all()), name


def test_biases_of_experts_are_kept_and_can_make_up_for_what_is_lost(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    pruned(zoo("gpt_oss"), tokens, plain)
    pruned(zoo("gpt_oss"), tokens, moved, solver={"compensate": True})
    dense, one, other = tensors(zoo("gpt_oss")), tensors(plain), tensors(moved)
    biases = [key for key in dense if "experts" in key and key.endswith("_bias")]
    assert len(biases) == 4
    for key in biases:
        assert torch.equal(one[key], dense[key])
        assert bool((other[key] != dense[key]).all())


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow),
                                    pytest.param("nemotron_h", marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.parametrize("tune", ["masked", "none"])
def test_rounds_are_never_above_one_shot(zoo: Zoo, tokens: Path, tmp_path: Path, family: str, tune: str) -> None:
    settings = {"iters": 2, "rounds": {"steps": 4, "tune": tune}, "pattern": "2:4"}
    report = pruned(zoo(family), tokens, tmp_path / "out", **settings)
    check(zoo(family), tmp_path / "out")
    best = next(entry for entry in report["rounds"] if entry["best"])
    assert best["heldout_kl"] <= report["rounds"][0]["heldout_kl"]
    assert report["rounds"][1]["kept"] and report["coverage"]
    for name, weight in weights(tmp_path / "out").items():
        assert bool(((weight != 0).reshape(len(weight), -1, 4).sum(-1) == 2).all()), name


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_corrected_targets_and_matching(zoo: Zoo, tokens: Path, tmp_path: Path, family: str) -> None:
    report = pruned(zoo(family), tokens, tmp_path / "out", target="stream", matching={"passes": 2})
    check(zoo(family), tmp_path / "out", tuned=True)
    corrected = {matrix["name"] for matrix in report["matrices"] if matrix["correction"] > 0}
    assert any("experts" in name for name in corrected)
    writers = {matrix["name"].rpartition("layers.")[2][2:] for matrix in report["matrices"] if matrix["residual"]}
    assert "self_attn.o_proj" in writers and not any(".experts." in name for name in writers)
    assert all(block["after"] <= block["before"] for block in report["matching"])
    assert report["sparsity"]["reached"] == 0.5


def test_allocation_shares_out_over_experts(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = pruned(zoo("mixtral"), tokens, tmp_path / "out", sparsity=0.7, allocation={"rules": ["owl"]})
    assert set(report["allocation"]["tried"]) == {"uniform", "owl"}
    total = report["sparsity"]["weights"]
    assert report["sparsity"]["zeros"] == pytest.approx(0.7 * total, abs=len(report["matrices"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_kept(zoo: Zoo, tokens: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    pruned(zoo("qwen3_moe", dtype), tokens, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {dtype}
    if dtype == torch.bfloat16:  # float16 is computed in float32 here, and in float16 by transformers
        check(zoo("qwen3_moe", dtype), tmp_path / "out")


class Killed(BaseException):
    """As sudden as a signal."""


def test_a_killed_round_goes_on_with_the_same_starved_experts(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"iters": 2, "experts": {"fewest": 130}}

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rounds_module.Rounds, "_round", killed)
        with pytest.raises(Killed):
            pruned(zoo("mixtral"), tokens, tmp_path / "killed", **settings)
    again = pruned(zoo("mixtral"), tokens, tmp_path / "killed", **settings)
    whole = pruned(zoo("mixtral"), tokens, tmp_path / "whole", **settings)
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert again["coverage"] == whole["coverage"]
    assert any(0 < len(entry["starved"]) < 6 for entry in whole["coverage"])


def test_experts_left_dense_are_said(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    settings = {"experts": {"starved": "skip", "fewest": 130}}
    report = pruned(zoo("mixtral"), tokens, tmp_path / "out", **settings)
    dense, found = weights(zoo("mixtral")), weights(tmp_path / "out")
    left = {f"{entry['layer']}.{expert}." for entry in report["coverage"] for expert in entry["starved"]}
    assert left and all(entry["fate"] == "left dense" for entry in report["coverage"])
    for name in found:
        assert torch.equal(found[name], dense[name]) == name.startswith(tuple(left))
    assert not any(matrix["name"].startswith(tuple(left)) for matrix in report["matrices"])
    assert report["sparsity"]["reached"] == 0.5  # of what is pruned


@pytest.mark.parametrize("settings", [{"iters": 2}, {"target": "stream", "matching": {"passes": 3, "rate": 0.1}}])
@pytest.mark.parametrize(
    "spared", [{"skip": [r"experts\.3\."]}, {"experts": {"starved": "skip", "fewest": 130}}], ids=["skip", "starved"]
)
def test_experts_that_stay_dense_are_not_tuned(
    zoo: Zoo, tokens: Path, tmp_path: Path, settings: Any, spared: Any
) -> None:
    report = pruned(zoo("mixtral"), tokens, tmp_path / "out", sparsity=0.7, **settings, **spared)
    dense, found = weights(zoo("mixtral")), weights(tmp_path / "out")
    chosen = {matrix["name"] for matrix in report["matrices"]}
    assert 0 < len(chosen) < len(found)
    assert report["rounds"][1:] or any(block["best"] for block in report["matching"])  # something was tuned
    assert all(torch.equal(found[name], dense[name]) == (name not in chosen) for name in found)


def test_allocation_does_not_share_out_what_may_stay_dense(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    settings = {"experts": {"starved": "skip"}, "allocation": {"rules": ["owl"]}, "sparsity": 0.7}
    with pytest.raises(InputError, match=r"with it set allocation\.rules=\[\]"):
        pruned(zoo("mixtral"), tokens, tmp_path / "out", **settings)


def test_experts_that_no_token_reaches_are_said(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = pruned(zoo("mixtral"), tokens, tmp_path / "out", experts={"fewest": 0}, data={"dataset": str(tokens),
                    "nsamples": 1, "seqlen": 2, "heldout": 6})  # fmt: skip
    for layer in report["coverage"]:
        assert layer["starved"] == [] and layer["unseen"] == [e for e, n in enumerate(layer["tokens"]) if n == 0] != []


def test_skipped_experts_are_not_counted(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = pruned(zoo("mixtral"), tokens, tmp_path / "out", skip=[r"layers\.0\.mlp\.experts", r"1\.down_proj"])
    assert [entry["layer"] for entry in report["coverage"]] == ["model.layers.1.mlp.experts"]
    some = pruned(zoo("mixtral"), tokens, tmp_path / "some", skip=[r"experts\.[0-4]\."], experts={"fewest": 10**6})
    assert [entry["starved"] for entry in some["coverage"]] == [[5], [5]]  # the others are none of our business
    assert report["skipped"]["model.layers.0.mlp.experts.3.up_proj"].startswith("matches --skip")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_line_tells_of_experts(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    asked = ["prune", str(zoo("mixtral")), "--dataset", str(tokens), "--nsamples", "12", "--seqlen", "32"]
    asked += ["--set", "data.heldout=6", "--solver", "sparsegpt", "--eval", "none", "-o", str(tmp_path / "out")]
    done = invoke(*asked, "--set", "experts.fewest=130")
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "12 in 2 layers, of" in said
    assert "saw fewer than 130 and were measured on all tokens of their layer" in said
    shown = " ".join(invoke("inspect", str(tmp_path / "out")).stdout.split())
    assert "experts of number least median most starved fate model.layers.0.mlp.experts 6 " in shown
    assert "measured on all tokens of their layer" in shown
    wrong = invoke(*asked, "--set", "experts.starved=all")
    assert wrong.exit_code == 2 and "known: all_tokens, skip, wanda" in wrong.output
    assert invoke(*asked, "--set", "experts.fewest=-1").exit_code == 2
    listed = invoke("inspect", str(zoo("mixtral"))).stdout
    assert listed.count("model.layers.1.mlp.experts.*.down_proj (6)") == 1 and "router, or gate" in listed


def test_a_dry_run_has_a_line_for_all_experts_of_a_layer(zoo: Zoo, tokens: Path) -> None:
    asked = ["prune", str(zoo("gpt_oss")), "--dataset", str(tokens), "--nsamples", "4", "--seqlen", "32", "--dry-run"]
    told = " ".join(invoke(*asked, "--pattern", "2:4").output.split())
    assert told.count("model.layers.*.mlp.experts.*.up_proj 12 48 32 768") == 1
    assert "experts.3" not in told
    machine = json.loads(invoke(*asked, "--json").stdout)
    assert sum(".experts." in matrix["name"] for matrix in machine["matrices"]) == 2 * 6 * 3


def test_settings_of_experts_do_nothing_to_a_dense_model(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = pruned(zoo("llama"), tokens, tmp_path / "out", experts={"starved": "wanda"})
    assert any("no mixture of experts" in warning for warning in report["warnings"])
    assert report["coverage"] == []


def test_the_journal_of_an_older_run_without_coverage_can_be_read(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = RunDir.commit
    monkeypatch.setattr(
        RunDir,
        "commit",
        lambda self, *what, coverage=(), **facts: commit(self, *what, **facts),  # as before
    )
    assert pruned(zoo("mixtral"), tokens, tmp_path / "out", iters=2)["coverage"] == []
