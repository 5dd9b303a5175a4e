"""The runner: what a recipe may say, what is held against `expected`, what is written; and every recipe of ours."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from obsprune import studies
from obsprune.errors import InputError
from obsprune.progress import Progress, Silent
from obsprune.report.figures import Dots, Figure
from obsprune.studies import recipes
from obsprune.studies.base import Outcome, Study, Table, spread
from obsprune.studies.material import Material
from obsprune.studies.recipes import Expected, Experiment, PaperRecipe, judge


@dataclass(frozen=True)
class Toy(Study):
    """Gives back its settings."""

    size: float = 3.0

    def run(self, material: Material, progress: Progress) -> Outcome:
        table = Table("Sizes", ["size", "what"], [[self.size / 3, "a|b"]])
        figure = Figure("dots", [Dots("t", "x", "y", {"a": ([1], [2])})])
        return Outcome({"size": self.size, "nan": float("nan")}, [table], [figure], {"data": "none"})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(recipes, "find_study", lambda name: Toy)
    path = tmp_path / "toy.yaml"
    path.write_text(
        "study: toy\nsettings: {size: 4, seeds: 7}\nsmoke: {seeds: 1}\nexpected:\n"
        "  size: {value: 4, tolerance: 0.5, source: me, smoke: true}\n  nan: {at_most: 1, source: me}\n"
    )
    return path


def test_a_run_is_judged_and_written(toy: Path, tmp_path: Path) -> None:
    results = Experiment.prepare(toy, tmp_path / "out", Material()).run(Silent())
    assert [(one["name"], one["met"]) for one in results["verdicts"]] == [("size", True), ("nan", False)]
    assert results["settings"] == {"seeds": 7, "size": 4}
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["values"]["size"] == 4
    assert written["versions"]["torch"]
    assert "| 1.333 |" in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "dots.png").stat().st_size > 1000


def test_seconds_of_a_resumed_run_are_told_as_such(toy: Path, tmp_path: Path) -> None:
    assert not Experiment.prepare(toy, tmp_path / "out", Material()).run(Silent())["resumed"]
    (tmp_path / "other-unfinished").mkdir()
    assert Experiment.prepare(toy, tmp_path / "other", Material()).run(Silent())["resumed"]


def test_a_smoke_run_and_changes(toy: Path, tmp_path: Path) -> None:
    smoke = Experiment.prepare(toy, tmp_path / "out", Material(), smoke=True).run(Silent())
    assert smoke["settings"]["seeds"] == 1
    assert [one["name"] for one in smoke["verdicts"]] == ["size"]
    changes = {"size": 5.0, "seeds": 2}
    changed = Experiment.prepare(toy, tmp_path / "out", Material(), changes=changes, force=True).run(Silent())
    assert changed["settings"] == {"seeds": 2, "size": 5.0}
    assert not changed["verdicts"][0]["met"]


@pytest.mark.parametrize(
    ("expected", "found", "met"),
    [
        (Expected("s", value=1.0, tolerance=0.1), 1.05, True),
        (Expected("s", value=1.0, tolerance=0.1), 1.2, False),
        (Expected("s", at_most=14), 14, True),
        (Expected("s", at_most=14), 15, False),
        (Expected("s", at_least=2), 2, True),
        (Expected("s", at_least=2), 1.9, False),
        (Expected("s", at_most=14), float("nan"), False),
        (Expected("s", value=1.0, tolerance=0.1), float("nan"), False),
    ],
)
def test_verdicts(expected: Expected, found: float, met: bool) -> None:
    assert judge({"a": expected}, {"a": found})[0].met == met


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("study: toy\nexpect: {}", "no key 'expect'"),
        ("study: toy\nsettings: {sise: 1}", r"no key 'settings.sise'.*did you mean size"),
        ("study: toy\nsettings: {size: big}", "float is expected"),
        ("study: toy\nexpected: {size: {value: 1, source: me}}", "give value and a tolerance"),
        ("study: toy\nexpected: {size: {at_most: 1, at_least: 0, source: me}}", "or at_most, or at_least"),
        ("study: toy\nexpected: {size: {at_most: 1}}", r"'expected.size.source' is missing"),
        ("study: toy\nsettings: {seeds: 0}", "seeds is 0"),
        ("- a list", "a mapping"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(toy: Path, tmp_path: Path, text: str, says: str) -> None:
    toy.write_text(text)
    with pytest.raises(InputError, match=says):
        Experiment.prepare(toy, tmp_path / "out", Material()).run(Silent())
    assert not (tmp_path / "out").exists()


def test_what_was_not_measured_is_not_met_and_nothing_is_lost(toy: Path, tmp_path: Path) -> None:
    toy.write_text("study: toy\nexpected: {weight: {at_most: 1, source: me}}")
    results = Experiment.prepare(toy, tmp_path / "out", Material()).run(Silent())
    assert [(one["found"], one["met"]) for one in results["verdicts"]] == [(None, False)]
    assert (tmp_path / "out" / "results.json").is_file()


def test_settings_that_break_a_study_are_named(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "run", lambda *_: [][0])
    with pytest.raises(InputError, match="does not work with size=0: list index out of range"):
        Experiment.prepare(toy, tmp_path / "out", Material(), changes={"size": 0}).run(Silent())
    with pytest.raises(IndexError):  # a mistake of ours, and not to be hidden
        Experiment.prepare(toy, tmp_path / "out", Material()).run(Silent())


def test_finished_results_are_kept(toy: Path, tmp_path: Path) -> None:
    Experiment.prepare(toy, tmp_path / "out", Material()).run(Silent())
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(InputError, match="results of a former run; use --force"):
        Experiment.prepare(toy, tmp_path / "out", Material())
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.parametrize("name", ["sparse-recovery/mnist", "obs-monks/monk1", "taylor-mnist1d/original"])
def test_data_is_asked_for_before_the_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data DIR"):
        Experiment.prepare(recipes.root() / f"{name}.yaml", tmp_path / "out", Material())


def test_nothing_of_others_is_overwritten(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="no result of a recipe"):
        Experiment.prepare(toy, tmp_path / "out", Material()).run(Silent())


def test_names() -> None:
    assert list(recipes.paths_of("taylor-mnist1d/original")) == ["taylor-mnist1d/original"]
    assert set(recipes.paths_of("taylor-mnist1d")) < set(recipes.names())
    assert list(recipes.paths_of("directional-pruning/vgg16-cifar10")) == ["directional-pruning/vgg16-cifar10"]
    assert not any(map(recipes.needs_gpu, recipes.paths_of("directional-pruning")))  # run by those who ask for them
    assert list(recipes.paths_of("some/where/mine.yaml").values()) == [Path("some/where/mine.yaml")]
    with pytest.raises(InputError, match="did you mean taylor-mnist1d"):
        recipes.paths_of("taylor-mnist")
    with pytest.raises(InputError, match="unknown study 'obs-monk'"):
        studies.find_study("obs-monk")


def test_data_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no folder of data was named; --data DIR, where DIR/mnist1d"):
        Material().mnist1d()


def test_a_pickle_may_hold_arrays_only(tmp_path: Path) -> None:
    (tmp_path / "mnist1d").mkdir()
    (tmp_path / "mnist1d" / "mnist1d_data.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(InputError, match=r"asks for os\.system"):
        Material(tmp_path).mnist1d()


def test_real_data(assets: Path) -> None:
    images, digits = Material(assets).mnist_test()
    assert (tuple(images.shape), float(images.max()), digits[:3].tolist()) == ((10000, 28, 28), 255.0, [7, 2, 1])
    signals = Material(assets).mnist1d()
    assert (tuple(signals.x.shape), tuple(signals.x_test.shape)) == ((4000, 40), (1000, 40))
    assert sorted(signals.y.unique().tolist()) == list(range(10))


def test_spread() -> None:
    assert spread([1.0, 3.0]) == "2 ± 1.4"
    assert spread([1.0]) == "1"


# ------------------------------------------------------------------------------------------------ our own recipes


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_says_what_it_is(name: str) -> None:
    path = recipes.root() / f"{name}.yaml"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# [A-Z].+; (about \d+ minutes? on 2 cores(; needs .+)?|needs a GPU.*)", first), first
    recipe = PaperRecipe.read(path)
    kind = studies.find_study(recipe.study)
    assert kind(**recipe.settings) != kind(**(recipe.settings | recipe.smoke))
    assert recipe.expected
    assert (path.parent / "README.md").is_file()


def measured() -> list[str]:
    """Recipes with committed results: one that needs a GPU may have none."""
    results = {name: recipes.root() / Path(name).parent / "results" / Path(name).name for name in recipes.names()}
    return [name for name, path in results.items() if path.is_dir() or not recipes.needs_gpu(name)]


@pytest.mark.parametrize("name", measured())
def test_committed_results_are_the_recipe_s_own(name: str) -> None:
    paper, _, own = name.partition("/")
    results = json.loads((recipes.root() / paper / "results" / own / "results.json").read_text(encoding="utf-8"))
    recipe = PaperRecipe.read(recipes.root() / f"{name}.yaml")
    kind = studies.find_study(recipe.study)
    assert results["settings"] == json.loads(json.dumps(vars(kind(**recipe.settings))))
    assert not results["smoke"]
    again = judge(
        recipe.expectations, {key: float("nan") if value is None else value for key, value in results["values"].items()}
    )
    assert [(one.name, one.met) for one in again] == [(one["name"], one["met"]) for one in results["verdicts"]]
    readme = (recipes.root() / paper / "README.md").read_text(encoding="utf-8")
    for figure in re.findall(r"\]\((results/[^)]+)\)", readme):
        assert (recipes.root() / paper / figure).is_file()
    assert "results/" in readme


def smoked() -> list[Any]:
    """All recipes; of a paper's at full size, which are for models of one kind, all but the first are slow."""
    large = [name for name in recipes.names() if recipes.needs_gpu(name)]
    first = {name.partition("/")[0]: name for name in reversed(large)}.values()
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in large and name not in first else name
        for name in recipes.names()
    ]


@pytest.mark.parametrize("name", smoked())
def test_smoke(name: str, assets: Path, tmp_path: Path) -> None:
    results = Experiment.prepare(recipes.root() / f"{name}.yaml", tmp_path / "out", Material(assets), smoke=True).run(
        Silent()
    )
    assert [one for one in results["verdicts"] if not one["met"]] == []
    assert results["values"]
    assert list((tmp_path / "out").glob("*.png"))
