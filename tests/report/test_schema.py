"""report.json is as its schema says, of every kind of run; the schema knows all that recipes and results hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from kinds import KINDS
from synthetic import synthetic_report

from obsprune.engine.layerwise import Pruned
from obsprune.engine.rundir import RunDir
from obsprune.evaluate.harness import mmlu_task
from obsprune.finetune_recipe import FinetuneRecipe
from obsprune.models.load import load
from obsprune.progress import Silent
from obsprune.ranks import ALONE
from obsprune.recipe import Recipe
from obsprune.report import report as report_module
from obsprune.report.page import PAGES
from obsprune.report.report import SCHEMA, finite, write_report
from obsprune.training_recipe import TrainingRecipe

TEXT = (Path(report_module.__file__).parent / "schema.json").read_text()
RULES: dict[str, Any] = json.loads(TEXT)
RECIPES = {"pruningRecipe": Recipe, "trainingRecipe": TrainingRecipe, "tuningRecipe": FinetuneRecipe}


def faults(report: Any, part: str = "") -> list[str]:
    """What is not as the schema says, with its place; `part`: of the schema alone."""
    rules = {**RULES["$defs"][part], "$defs": RULES["$defs"]} if part else RULES
    errors = (leaf for error in Draft202012Validator(rules).iter_errors(report) for leaf in leaves(error))
    return [f"{error.json_path}: {error.message[:300]}" for error in errors]


def leaves(error: ValidationError) -> Iterator[ValidationError]:
    """Where one of several rules should hold, what is wrong with each of them."""
    if not error.context:
        yield error
    for one in error.context or ():
        yield from leaves(one)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_report_as_the_schema_says(made: Callable[[str], Path], kind: str) -> None:
    directory = made(kind)
    report = json.loads((directory / "report.json").read_text())
    assert faults(report) == []
    for name, make in PAGES.items():
        assert (directory / name).read_text() == make(report), "of what is in the file"


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(RULES)
    assert RULES["properties"]["schema"]["const"] == SCHEMA and str(SCHEMA) in RULES["$id"].split(":")
    assert json.dumps(RULES, indent=1, ensure_ascii=False) + "\n" == TEXT


def test_everything_in_it_is_explained_and_used() -> None:
    """It is the documentation."""
    assert [name for name, rule in named(RULES) if not rule.keys() & {"description", "$ref"}] == []
    assert set(re.findall(r'"#/\$defs/(\w+)"', TEXT)) == RULES["$defs"].keys()


def named(tree: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rule of every key that an object may have."""
    if isinstance(tree, dict):
        yield from tree.get("properties", {}).items()
        for part in tree.values():
            yield from named(part)


def test_a_change_is_seen() -> None:
    report = synthetic_report(2)
    assert faults(report) == []
    broken: list[dict[str, Any]] = [
        report | {"extra": 1},
        report | {"schema": SCHEMA + 1},
        report | {"rounds": None},
        {key: value for key, value in report.items() if key != "coverage"},
        report | {"matrices": [report["matrices"][0] | {"surprise": 1}]},
        report | {"recipe": report["recipe"] | {"sparsity": "half"}},
        report | {"data": report["data"] | {"sha256": "none"}},
    ]
    assert all(faults(one) for one in broken)


@pytest.mark.parametrize(("part", "kind"), RECIPES.items())
def test_it_knows_every_setting(part: str, kind: Any) -> None:
    """A new one must be written down there, too."""
    assert faults_of_names(RULES["$defs"][part], kind().tree()) == []


def faults_of_names(rule: Mapping[str, Any], tree: Mapping[str, Any]) -> list[str]:
    """Settings that one knows and the other does not."""
    rule = RULES["$defs"][rule["$ref"].rpartition("/")[2]] if "$ref" in rule else rule
    if "properties" not in rule or rule.get("additionalProperties") is not False:
        return []
    found = [*(rule["properties"].keys() ^ tree.keys())]
    for name, value in tree.items():
        if isinstance(value, dict) and name in rule["properties"]:
            found += faults_of_names(rule["properties"][name], value)
    return found


def test_it_knows_all_that_is_said_of_a_matrix() -> None:
    known = RULES["$defs"]["matrix"]["properties"].keys()
    assert known == {field.name for field in fields(Pruned)} | {"block", "dtype"}


def test_numbers_that_are_none_are_null() -> None:
    tree = {"a": float("inf"), "b": [float("nan"), 1.5, (2, -float("inf"))], "c": "inf", "d": None}
    assert finite(tree) == {"a": None, "b": [None, 1.5, [2, None]], "c": "inf", "d": None}


def test_errors_that_are_no_numbers_can_be_written(tmp_path: Path) -> None:
    report = synthetic_report(4)
    for matrix, error in zip(report["matrices"], (float("nan"), float("inf")), strict=False):
        matrix["error"] = error
    write_report(RunDir(tmp_path, [], ALONE), report)
    written = json.loads((tmp_path / "report.json").read_text())
    assert [matrix["error"] for matrix in written["matrices"][:2]] == [None, None]
    assert all((tmp_path / name).read_text() == make(written) for name, make in PAGES.items())


def test_a_page_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    report = synthetic_report(1)
    del report["sparsity"]["pattern"]
    with pytest.raises(KeyError):
        write_report(RunDir(tmp_path, [], ALONE), report)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_lm_eval(assets: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm_eval")
    task = mmlu_task(assets / "mmlu", 1, 0)
    values = task.score(load(str(assets / "stories260k")), Silent(), "dense").values
    assert values["groups"] and values["subjects"] and values["metrics"]
    assert faults(finite(values | {"seconds": 1.0}), "score") == []
