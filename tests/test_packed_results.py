"""`obsprune prune --format packed`: what pack makes of the dense result, whatever happens on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import ZOO as FAMILIES
from zoo import Zoo, random_model, tokens_in

import obsprune
from obsprune import pipeline
from obsprune.engine.packing import pack
from obsprune.errors import InputError
from obsprune.eval_pipeline import evaluate_checkpoint
from obsprune.models.load import open_checkpoint
from obsprune.outlook import describe, look_ahead
from obsprune.plan import bytes_needed, make_plan
from obsprune.progress import Silent
from obsprune.recipe import Recipe, make_recipe

ABOUT = {"report.json", "report.html", "report.md", "recipe.yaml", "progress.jsonl", "README.md"}
"""What tells of a run, its times and its format among other things."""
Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A small recipe, with these settings."""
    model, tokens = Zoo(tmp_path)("llama"), tokens_in(tmp_path)
    common = {"model": {"name": str(model)}, "data": {"dataset": str(tokens), "nsamples": 2, "heldout": 2}}
    return lambda **settings: make_recipe(common, {"evaluation": ["heldout"]}, settings)


def run(recipe: Recipe, output: Path) -> Any:
    return pipeline.prune(recipe, output, Silent())


def ended_before(step: str, recipe: Recipe, output: Path) -> None:
    """A run that ends before one of the pipeline's steps."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(pipeline, step, lambda *_: 1 / 0)
        run(recipe, output)


def test_it_is_what_pack_makes_of_the_dense_result(make: Make, tmp_path: Path) -> None:
    run(make(), tmp_path / "dense")
    report = run(make(format="packed"), tmp_path / "packed")
    told = pack(tmp_path / "dense", tmp_path / "expected", Silent())
    found, expected = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("packed", "expected"))
    assert found.keys() == expected.keys() > ABOUT
    for name in found.keys() - ABOUT:
        assert found[name].read_bytes() == expected[name].read_bytes(), name
    assert report["packed"]["packed_bytes"] == told["packed_bytes"] and report["recipe"]["format"] == "packed"
    with pytest.raises(InputError, match="holds a finished run"):
        run(make(format="packed"), tmp_path / "packed")
    seen = pipeline.inspect_result(tmp_path / "packed")
    assert seen["matrices"] == report["matrices"]
    score = evaluate_checkpoint(str(tmp_path / "packed"), [], Silent())["tasks"]["heldout"]["model"]
    assert score["perplexity"] == pytest.approx(report["evaluation"]["heldout"]["pruned"]["perplexity"], rel=1e-6)


def test_another_format_is_another_recipe(make: Make, tmp_path: Path) -> None:
    ended_before("evaluate_result", make(), tmp_path / "out")
    with pytest.raises(InputError, match=r"another recipe \(format: dense -> packed\)"):
        run(make(format="packed"), tmp_path / "out")
    with pytest.raises(InputError, match="format is 'packd'; did you mean packed"):
        make(format="packd")


def test_a_packed_result_can_be_evaluated_again(make: Make, tmp_path: Path) -> None:
    """The run is ended once the dense files are gone, and asked for other tasks then."""
    ended_before("write_report", make(format="packed", evaluation=["none"]), tmp_path / "out")
    assert not list((tmp_path / "out").glob("model*")) and not (tmp_path / "out/report.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_sparse", None)  # nothing is pruned again
        found = run(make(format="packed"), tmp_path / "out")["evaluation"]["heldout"]
    expected = run(make(), tmp_path / "dense")["evaluation"]["heldout"]
    assert found["dense"]["perplexity"] == expected["dense"]["perplexity"]
    assert found["pruned"]["perplexity"] == pytest.approx(expected["pruned"]["perplexity"], rel=1e-6)


def test_a_dry_run_counts_the_room_of_both_and_the_time(make: Make, tmp_path: Path) -> None:
    dense, packed = (
        describe(look_ahead(make(format=name), tmp_path / "out", Silent())) for name in ("dense", "packed")
    )
    size = open_checkpoint(Path(dense["recipe"]["model"]["name"])).bytes
    assert packed["memory"]["disk_bytes"] == dense["memory"]["disk_bytes"] + size
    assert packed["seconds"].keys() - dense["seconds"].keys() == {"packing"} and packed["seconds"]["packing"] > 0


def test_what_is_gone_by_then_needs_no_room_beside_the_packed_files(make: Make) -> None:
    rounds = {"iters": 2, "rounds": {"scored": True}}
    dense, packed = (bytes_needed(make_plan(make(format=name, **rounds))) for name in ("dense", "packed"))
    assert packed == dense


def test_a_model_in_memory_gets_the_weights_of_a_packed_result(tmp_path: Path) -> None:
    class Processor:
        def save_pretrained(self, directory: Path) -> None: ...

    model, tokens = random_model(FAMILIES["llama"]), tokens_in(tmp_path)
    recipe = {"data": {"dataset": str(tokens), "nsamples": 2}, "evaluation": ["none"], "format": "packed"}
    result = obsprune.prune(model, ["fast", recipe], processor=Processor(), output=tmp_path / "out")
    checkpoint, own = open_checkpoint(tmp_path / "out"), model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in checkpoint.read(checkpoint.headers).items())
    assert json.loads((tmp_path / "out/report.json").read_text())["sparsity"]["reached"] == result.sparsity == 0.5
