"""Laws of growth are found where they hold, and a real grid is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from obsprune.bench.growth import LAWS, Grid, fitted, growth, laws
from obsprune.bench.runs import Asked
from obsprune.errors import InputError
from obsprune.models.shapes import Shape
from obsprune.progress import Silent
from obsprune.trees import Tree

GRID = [(d, n) for d in (256.0, 512.0, 768.0, 1024.0) for n in (512.0, 1024.0, 2048.0, 4096.0)]


def made(a: float, b: float, c: float, off: float = 0.0) -> list[dict[str, Any]]:
    """Points that obey a d³ + b N d² + c, each second one off by a share."""
    shares = [1 + off * (-1) ** index for index in range(len(GRID))]
    return [
        {
            "width": d, "tokens": n, "seconds": (a * d**3 + b * n * d**2 + c) * share,
            "bytes": (a * d**2 + b * n * d + c) * share, "by_width": a * d**3 * share,
            "by_tokens": b * n * d**2 * share,
        }
        for (d, n), share in zip(GRID, shares, strict=True)
    ]  # fmt: skip


def test_a_law_is_found_where_it_holds() -> None:
    found = laws(made(3e-9, 2e-9, 0.1))
    for quantity in ("seconds", "bytes"):
        assert list(found[quantity]["coefficients"].values()) == pytest.approx([3e-9, 2e-9, 0.1], rel=1e-4)
        assert found[quantity]["farthest"] < 1e-6
        assert sum(found[quantity]["shares"].values()) == pytest.approx(1)
    assert found["powers"]["by_width"] == pytest.approx({"d": 3})
    assert found["powers"]["by_tokens"] == pytest.approx({"N": 1, "d": 2})


def test_noise_is_told() -> None:
    found = fitted(made(3e-9, 2e-9, 0.1, off=0.1), "seconds", LAWS["seconds"])
    assert 0.08 < found["farthest"] < 0.15


def test_no_coefficient_is_negative() -> None:
    found = fitted(made(3e-9, 2e-9, -0.05), "seconds", LAWS["seconds"])["coefficients"]
    assert found["1"] == 0 and found["d³"] > 0 and found["N·d²"] > 0


def test_a_small_grid_is_measured(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    grid = Grid((64, 128), (2, 4), 32, "float32")
    told: list[int] = []
    asked = Asked(methods=("sparsegpt",), device="cpu", workdir=tmp_path)
    found = growth(asked, Silent(), lambda found: told.append(len(found["points"])), grid)
    assert told == [1, 2, 3, 4]
    assert [(one["width"], one["tokens"]) for one in found["points"]] == [(64, 64), (64, 128), (128, 64), (128, 128)]
    assert all(one["seconds"] > one["by_tokens"] + one["by_width"] > 0 < one["bytes"] for one in found["points"])
    assert set(found["laws"]) == {"seconds", "bytes", "powers"}
    assert torch.get_num_threads() == threads and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "setting", [{"data": {"nsamples": 4}}, {"data": {"seqlen": 64}}, {"data": {"heldout": 2}}, {"evaluation": []}]
)
def test_what_the_grid_says_is_not_asked_for(setting: Tree, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has its own"):
        growth(Asked(device="cpu", settings=[setting], workdir=tmp_path), Silent())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"methods": ("sparsgpt",)}, "unknown method"),
        ({"settings": [{"model": {"name": "demo"}}]}, "has its own model.name"),
        ({"settings": [{"data": 5}]}, "'data' is 5"),
    ],
)
def test_a_wrong_wish_is_refused_before_a_model_is_made(
    wish: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shape, "filled", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(InputError, match=said):
        growth(Asked(device="cpu", workdir=tmp_path, **wish), Silent())
