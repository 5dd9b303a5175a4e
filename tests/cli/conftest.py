"""The command line, driven in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver import Cli
from typer.testing import CliRunner


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `obsprune WORDS…` in an empty directory."""
    from obsprune.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OBSPRUNE_DEBUG", raising=False)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="session")
def pruned_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, pruned once to 50 % with a small calibration."""
    from obsprune.pipeline import prune
    from obsprune.progress import Silent
    from obsprune.recipe import make_recipe

    output = tmp_path_factory.mktemp("pruned") / "demo-50"
    recipe = make_recipe({"model": {"name": "demo"}, "data": {"nsamples": 8}, "evaluation": ["heldout"]})
    prune(recipe, output, Silent())
    return output
