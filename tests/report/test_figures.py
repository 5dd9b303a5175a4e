"""Figures are files that can be looked at, and the same figure is the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from obsprune.errors import OutputError
from obsprune.report.figures import Curves, Dots, Figure, Line, Panel, Pictures, save

PANELS: dict[str, Panel] = {
    "curves": Curves(
        "t", "x", "y", {"a": Line([0, 1], [1, 10], [0.5, 5], [2, 20]), "b": Line([0, 1], [3, 4])}, True, True
    ),
    "dots": Dots("t", "x", "y", {"a": ([1, 2], [3, 4])}, log_y=True),
    "pictures": Pictures("t", {"true": [torch.eye(4)], "found": [torch.zeros(4, 4)]}),
}


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_is_drawn(name: str, tmp_path: Path) -> None:
    path = save(Figure(name, [PANELS[name]]), tmp_path)
    pixels = torch.tensor(list(Image.open(path).convert("L").tobytes()))
    assert path == tmp_path / f"{name}.png"
    assert len(pixels.unique()) > 10  # neither blank nor one blot


def test_panels_stand_side_by_side_and_bytes_repeat(tmp_path: Path) -> None:
    figure = Figure("all", list(PANELS.values()))
    (tmp_path / "again").mkdir()
    first, second = save(figure, tmp_path), save(figure, tmp_path / "again")
    width, height = Image.open(first).size
    assert width > 3 * height
    assert first.read_bytes() == second.read_bytes()


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save(Figure("a", [PANELS["dots"]]), tmp_path / "absent")
