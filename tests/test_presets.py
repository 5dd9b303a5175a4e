"""Presets: readable recipes, laid under or over what the user says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from obsprune.cli import app
from obsprune.errors import InputError
from obsprune.presets import DEFAULT, layered, names, path_of
from obsprune.recipe import make_recipe
from obsprune.trees import read_recipe


def test_every_preset_is_a_recipe_with_a_first_line_that_says_what_it_is() -> None:
    assert names() == ["balanced", "best", "fast"] and DEFAULT in names()
    for name in names():
        assert path_of(name).read_text().startswith("# ")
        make_recipe(read_recipe(path_of(name)))
    with pytest.raises(InputError, match="'bets'; did you mean best"):
        path_of("bets")


SOLVER, TARGET = "solver", "target"


@pytest.mark.parametrize(
    ("preset", "config", "flags", "expected"),
    [
        (None, {}, {}, ("admm", "stream", 1)),
        (None, {}, {"solver": {"name": "wanda"}}, ("wanda", "own", 1)),  # the pure published method
        (None, {"solver": {"name": "sparsegpt"}}, {}, ("sparsegpt", "own", 1)),
        (None, {"target": "own"}, {}, ("admm", "own", 1)),  # a file overrides the default preset
        (None, {}, {"solver": {"damping": 0.1}}, ("admm", "stream", 1)),
        ("fast", {}, {}, ("sparsegpt", "own", 1)),
        ("best", {"iters": 7, "solver": {"name": "wanda"}}, {}, ("admm", "stream", 3)),  # a flag overrides the file
        ("best", {}, {"iters": 1, "pattern": "2:4"}, ("admm", "stream", 1)),
        ("best", {}, {"solver": {"name": "sparsegpt"}}, ("sparsegpt", "stream", 3)),
    ],
)
def test_what_overrides_what(
    preset: str | None, config: dict[str, Any], flags: dict[str, Any], expected: tuple[str, str, int]
) -> None:
    recipe = make_recipe(*layered(preset, config, flags))
    assert (recipe.solver["name"], recipe.target, recipe.iters) == expected


def test_recipe_list_and_show() -> None:
    run = CliRunner().invoke
    listed = run(app, ["recipe", "list"])
    assert [line.split()[0] for line in listed.stdout.splitlines()[1 : 1 + len(names())]] == names()
    shown = run(app, ["recipe", "show", "best"])
    assert (shown.exit_code, shown.stdout) == (0, path_of("best").read_text())
    refused = run(app, ["recipe", "show", "worst"])
    assert refused.exit_code == 2 and "unknown recipe 'worst'" in refused.stderr and "best" in refused.stderr


def test_a_shown_preset_is_a_config(tmp_path: Path) -> None:
    text = CliRunner().invoke(app, ["recipe", "show", "fast"]).stdout
    (tmp_path / "mine.yaml").write_text(text)
    words = ["prune", "demo", "--dry-run", "--json", "--nsamples", "4"]
    one, other = (
        json.loads(CliRunner().invoke(app, [*words, *how]).stdout)["recipe"]
        for how in (["--config", str(tmp_path / "mine.yaml")], ["--preset", "fast"])
    )
    assert one == other and one["solver"]["refit"] == 10
