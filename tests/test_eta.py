"""What a run tells of the time left: how much each block costs, what follows, and what was done before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import Recipe, make_recipe


@dataclass
class Told(Silent):
    """Remembers stages and what follows them, and stops the run after so many blocks."""

    stop: int = 99
    ahead_now: tuple[float, str] = (0.0, "")
    stages: dict[str, tuple[Any, str]] = field(default_factory=dict)
    costs: list[float] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)
    current: str = ""

    def stage(self, title: str, total: int, costs: Sequence[float] = ()) -> None:
        self.current = title
        self.stages[title] = self.ahead_now
        if title == "pruning":
            self.costs = list(costs)

    def step(self, text: str = "", fresh: bool = True) -> None:
        if self.current == "pruning":
            self.fresh.append(fresh)
            if len(self.fresh) == self.stop:
                raise KeyboardInterrupt

    def ahead(self, seconds: float, then: str = "") -> None:
        self.ahead_now = seconds, then


def recipe(iters: int = 1) -> Recipe:
    data = {"nsamples": 4}
    rounds = {"steps": 2}
    return make_recipe(
        {"model": {"name": "demo"}, "data": data, "evaluation": ["heldout"], "iters": iters, "rounds": rounds}
    )


def dense_seconds(output: Path) -> float:
    events = map(json.loads, (output / "progress.jsonl").read_text().splitlines())
    return sum(float(event["seconds"]) for event in events if event["kind"] == "score" and event["who"] == "dense")


def test_what_follows_the_pruning(tmp_path: Path) -> None:
    told = Told()
    prune(recipe(), tmp_path / "out", told)
    assert told.stages["heldout, dense"] == (0.0, "pruning")
    assert told.stages["pruning"] == (pytest.approx(dense_seconds(tmp_path / "out")), "")
    assert told.stages["heldout, pruned"] == (0.0, "")
    assert len(told.costs) == 4 and len(set(told.costs)) == 1 and told.fresh == [True] * 4


def test_rounds_of_unknown_length_are_said(tmp_path: Path) -> None:
    told = Told()
    prune(recipe(iters=2), tmp_path / "out", told)
    assert told.stages["pruning"] == (pytest.approx(dense_seconds(tmp_path / "out")), "1 more round")
    assert told.stages["gradients and projections"][1] == "more rounds"


def test_blocks_of_a_former_part_of_the_run_are_not_timed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(recipe(), tmp_path / "out", Told(stop=2))
    told = Told()
    prune(recipe(), tmp_path / "out", told)
    assert told.fresh == [False, False, True, True]


@pytest.mark.parametrize(("flag", "typo"), [("--solver", "sparsgpt"), ("--preset", "balancd")])
def test_a_misspelt_name_is_seen_before_transformers_is_imported(flag: str, typo: str) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from obsprune.cli import app\n"
        f"result = CliRunner().invoke(app, ['prune', 'demo', '{flag}', '{typo}'])\n"
        "assert result.exit_code == 2 and 'did you mean' in result.stderr, result.stderr\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
