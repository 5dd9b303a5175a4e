"""docs/results.md is what the recipes and their results say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import results_table  # noqa: E402

from obsprune.studies.recipes import Expected, PaperRecipe, names, root  # noqa: E402


def test_the_page_is_up_to_date() -> None:
    """Else: python scripts/results_table.py."""
    assert results_table.PAGE.read_text(encoding="utf-8") == results_table.page()


def test_every_published_value_has_a_row_with_its_protocol() -> None:
    lines = results_table.page().splitlines()
    for name in names():
        paper, _, own = name.partition("/")
        for key, expected in PaperRecipe.read(root() / f"{name}.yaml").expectations.items():
            found = [line for line in lines if line.startswith(f"| {own}: {key} |") and expected.source in line]
            told = expected.source.startswith(results_table.OURS) and results_table.AGAINST not in expected.source
            assert bool(found) != told, (paper, own, key)
            for line in found:
                assert line.split(" | ")[4].strip(), line
                theirs = not expected.source.startswith(results_table.OURS)
                assert (theirs and "unverified" in expected.source) == ("†" in line), line


@pytest.mark.parametrize(("found", "verdict"), [({"a": 2.1}, "holds"), ({"a": 3.0}, "**differs**"),
                                                ({"b": 1.0}, "**differs**"), ({}, "not run")])  # fmt: skip
def test_verdicts(found: dict[str, float], verdict: str) -> None:
    expected = Expected("the paper, unverified", 2.0, 0.2)
    line = results_table.row("a", expected, found, "a", "told")
    assert f" | 2 ± 0.2 † | {verdict} | told | " in line


def test_what_contradicts_a_paper_is_never_as_published() -> None:
    line = results_table.row("a", Expected("measured here, against the paper", 2.0, 0.2), {"a": 2.0}, "a", "told")
    assert "| 2 |  | **differs** |" in line
