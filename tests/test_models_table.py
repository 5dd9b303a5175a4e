"""docs/models.md says what is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from models_table import INTRODUCTION, NOTES, SECTIONS, page, row
from zoo import PICTURED, Zoo

PAGE = (Path(__file__).parents[1] / "docs/models.md").read_text()


@pytest.mark.parametrize("name", [name for families in SECTIONS.values() for name in families])
def test_every_line_is_what_is_found(zoo: Zoo, tokens: Path, pictures: Path, tmp_path: Path, name: str) -> None:
    found = row(zoo, name, pictures if name in PICTURED else tokens, tmp_path / "out")
    assert found in PAGE.splitlines()
    assert "NO" not in found.split()


def test_the_page_has_these_lines_and_no_others() -> None:
    lines = {line.split(" | ")[1]: line for line in PAGE.splitlines() if line.endswith(" yes |")}
    assert list(lines) == [name for families in SECTIONS.values() for name in families]
    assert page(lines) == PAGE
    assert INTRODUCTION in PAGE and NOTES in PAGE
