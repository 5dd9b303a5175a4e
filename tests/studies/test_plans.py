"""Recipes that nobody runs here: each can be planned at its full size, from its shape alone. Their smoke runs are in
test_recipes.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from obsprune.errors import InputError
from obsprune.models.shapes import SHAPES
from obsprune.studies import recipes
from obsprune.studies.material import Material
from obsprune.studies.mobilenet_rounds import MobilenetRounds
from obsprune.studies.pruning import Pruning
from obsprune.studies.xor import Xor


def pruning(name: str) -> Pruning | None:
    """The study of a recipe that prunes a checkpoint."""
    study = recipes.opened(recipes.root() / f"{name}.yaml")[1]
    return study if isinstance(study, Pruning) else None


FULL = {name: study for name in recipes.names() if recipes.needs_gpu(name) if (study := pruning(name))}
"""Recipes at full size."""
LARGEST = {"sparsegpt-opt/13b", "sparsegpt-opt/30b", "sparsegpt-opt/66b"}
SIZES = {
    # pruned weights, half of which go: all linear layers of the blocks
    "iobs-deit/tiny": 5_308_416,
    "iobs-deit/small": 21_233_664,
    "iobs-deit/base": 84_934_656,
    "iobs-llama/llama-2-7b": 6_476_005_376,
    "iobs-llama/llama-3-8b": 6_979_321_856,
    "sparsegpt-opt/125m": 84_934_656,
    "sparsegpt-opt/66b": 65_229_815_808,
}


def dry_run(name: str, *words: str) -> Result:
    from obsprune.cli import app

    return CliRunner().invoke(app, ["recipe", "run", name, "--dry-run", *words])


@pytest.fixture(autouse=True)
def no_material(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OBSPRUNE_ASSETS", raising=False)
    monkeypatch.chdir(tmp_path)


def test_there_are_some_of_each_paper() -> None:
    assert {name.partition("/")[0] for name in FULL} >= {"iobs-deit", "iobs-llama", "sparsegpt-opt"}
    assert SIZES.keys() <= FULL.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGEST else name for name in FULL]
)
def test_a_full_size_recipe_can_be_planned_without_data(name: str, tmp_path: Path) -> None:
    study = FULL[name]
    assert SHAPES[study.shape].id == study.model
    result = dry_run(name, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)[name]["values"]
    for case in study.cases:
        told = {what: values[f"{case.name}.{what}"] for what in ("weights", "zeros", "rounds", "samples")}
        data = {**study.common["data"], **study.forms[case.form].get("data", {})}
        assert told["weights"] == SIZES.get(name, told["weights"])
        assert 2 * told["zeros"] == told["weights"]
        assert told["rounds"] == study.common.get("iters", 1)
        assert told["samples"] == data["nsamples"]
        assert values[f"{case.name}.predictions"] == data["nsamples"] * data.get("seqlen", 1)
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_person() -> None:
    lines = dry_run("iobs-deit/tiny").stdout.splitlines()
    assert lines[0] == "iobs-deit/tiny"
    assert any("facebook/deit-tiny-patch16-224" in line and "22,869,664" in line for line in lines)
    row = "newton 0.5 72 5,308,416 2,654,208 100 none, newton 1,000 images"
    assert row in [" ".join(line.split()) for line in lines]


def test_a_paper_is_planned_whole_but_not_run_where_all_of_it_needs_a_gpu() -> None:
    plans: dict[str, Any] = json.loads(dry_run("sparsegpt-opt", "--smoke", "--json").stdout)
    assert len(plans) == 8
    assert plans["sparsegpt-opt/66b"]["values"]["sparsegpt.2:4.weights"] == 2 * 12 * 32**2
    with pytest.raises(
        InputError, match=r"all of sparsegpt-opt need a GPU; name one of sparsegpt-opt/1\.3b, .*dry-run"
    ):
        recipes.paths_of("sparsegpt-opt")
    assert len(recipes.paths_of("sparsegpt-opt", large=True)) == 8
    assert set(recipes.paths_of("iobs-deit")).isdisjoint(FULL)


def test_a_model_in_the_material_is_planned_by_its_headers(assets: Path) -> None:
    study = Pruning(model="stories260k", shape="llama-2-7b", common={"data": {"nsamples": 8}})
    values = study.plan(Material(assets)).values
    assert (values["sparsegpt.0.5.weights"], values["bytes"]) == (226_560, 1_040_128)
    assert values["sparsegpt.0.5.predictions"] == 8 * 512  # of the 2048 asked for


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["obs-monks/xor"], "this experiment has nothing to plan: run it with --smoke"),
        (["iobs-deit/tiny", "--set", "shape=deit-tin"], "unknown shape 'deit-tin'; did you mean deit-tiny"),
        (["iobs-deit/tiny", "--set", "model=mine"], "the model is needed and no folder of data was named"),
        (["iobs-deit/tiny", "--set", "evaluation=['imagenet=']"], "task 'imagenet=' names no file"),
        (["iobs-deit/tiny", "--set", "patterns=['5:7']"], "pattern"),
        (["iobs-deit/tiny", "--set", "seeds=0"], "seeds is 0"),
    ],
)
def test_what_cannot_be_planned(words: list[str], says: str) -> None:
    result = dry_run(*words)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_what_can_be_planned_is_and_the_others_say_why() -> None:
    plans: dict[str, Any] = json.loads(dry_run("iobs-deit", "--json").stdout)
    assert plans.keys() == {name for name in recipes.names() if name.startswith("iobs-deit/")}
    local = plans.pop("iobs-deit/local")
    assert "the model is needed and no folder of data was named" in local["not_planned"]
    assert all(plan["values"]["bytes"] for plan in plans.values())
    lines = dry_run("iobs-deit").stdout.splitlines()
    assert [line for line in lines if line.startswith("iobs-deit/")] == [
        *plans, f"iobs-deit/local is not planned: {local['not_planned']}"
    ]  # fmt: skip


def test_nothing_that_can_be_planned_is_an_error() -> None:
    result = dry_run("obs-monks")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "obs-monks/monk1: this experiment has nothing to plan" in result.stderr
    assert "obs-monks/xor: this experiment" in result.stderr


def test_a_plan_needs_the_model_alone(assets: Path) -> None:
    study = MobilenetRounds(calibration_from="none", forms=["sparsegpt"], sparsities=[0.5])
    assert study.plan(Material(assets)).values["sparsegpt.0.5.zeros"] > 0


def test_a_study_without_a_plan_says_so() -> None:
    with pytest.raises(InputError, match="nothing to plan"):
        Xor().plan(Material())
