"""`obsprune recipe`: what it lists, shows, runs and answers."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from driver import Cli

from obsprune.progress import Progress
from obsprune.studies import recipes
from obsprune.studies.base import Outcome, Study
from obsprune.studies.material import Material


@dataclass(frozen=True)
class Constant(Study):
    """Gives back one number, and says where its data would be."""

    size: float = 3.0

    def run(self, material: Material, progress: Progress) -> Outcome:
        progress.stage("counting", 1)
        progress.step("counted")
        return Outcome({"size": self.size}, facts={"data": str(material.folder)})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(recipes, "find_study", lambda name: Constant)
    monkeypatch.delenv("OBSPRUNE_ASSETS", raising=False)
    (tmp_path / "toy.yaml").write_text("study: x\nexpected: {size: {value: 3, tolerance: 0.1, source: a paper}}\n")
    return "toy.yaml"


def test_list_names_presets_and_experiments(cli: Cli) -> None:
    lines = cli("recipe", "list").stdout.splitlines()
    assert any(line.startswith("  balanced ") for line in lines)
    assert any(line.startswith("  taylor-mnist1d/original ") and "needs mnist1d/" in line for line in lines)


def test_show_prints_yaml(cli: Cli) -> None:
    assert "solver:" in cli("recipe", "show", "balanced").stdout
    assert "study: taylor-mnist1d" in cli("recipe", "show", "taylor-mnist1d/original").stdout
    assert cli("recipe", "show", "taylor-mnist1d").stdout.count("study:") > 1


def test_a_run_that_is_as_expected(cli: Cli, toy: str, tmp_path: Path) -> None:
    result = cli("recipe", "run", toy)
    assert result.exit_code == 0, result.stderr
    assert "PASS" in result.stdout and "3 ± 0.1" in result.stdout and "a paper" in result.stdout
    assert "counted" in result.stderr
    assert (tmp_path / "obsprune-out/recipes/toy/results.json").is_file()


def test_a_run_that_differs_ends_with_1(cli: Cli, toy: str) -> None:
    result = cli("recipe", "run", toy, "--set", "size=4", "--seeds", "2", "--data", ".", "-o", "out", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["toy"]
    assert found["settings"] == {"seeds": 2, "size": 4}
    assert found["facts"] == {"data": "."}
    assert found["verdicts"][0]["met"] is False
    assert "DIFFERS" in cli("recipe", "run", toy, "--set", "settings.size=4").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "unknown recipe 'nothing'"),
        (["balanced"], "balanced is a preset; obsprune prune MODEL --preset balanced"),
        (["absent.yaml"], "there is no recipe absent.yaml"),
        (["toy.yaml", "--set", "sise=3"], "did you mean size"),
        (["toy.yaml", "-o", "toy.yaml"], "choose another -o"),
        (["toy.yaml", "--data", "nowhere"], "Invalid value"),
    ],
)
def test_what_cannot_be_run(cli: Cli, toy: str, words: list[str], says: str) -> None:
    result = cli("recipe", "run", *words)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_data_that_is_needed_is_asked_for(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OBSPRUNE_ASSETS", raising=False)
    result = cli("recipe", "run", "taylor-mnist1d/original", "--smoke")
    assert result.exit_code == 2
    assert "--data DIR, where DIR/mnist1d/mnist1d_data.pkl is" in result.stderr


@pytest.mark.parametrize("library", ["matplotlib.figure", "optuna"])
def test_a_library_that_is_not_there_is_named(
    cli: Cli, library: str, monkeypatch: pytest.MonkeyPatch, assets: Path
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    words = ("--smoke", "--data", str(assets), "--set", "methods=[magnitude]")
    result = cli("recipe", "run", "taylor-mnist1d/original", *words)
    assert result.exit_code == 2
    assert "pip install 'obsprune[recipes]'" in result.stderr
