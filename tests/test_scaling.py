"""docs/scaling.md has the figures that scripts/scaling.py computes, and these follow from the shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import scaling  # noqa: E402  # a script, beside the package

PAGE = (ROOT / "docs/scaling.md").read_text()
TINY = scaling.Llama("tiny", 2, 4, 6, 2, 10)


@pytest.mark.parametrize("name", scaling.TABLES)
def test_the_page_has_every_table_as_it_is_computed(name: str) -> None:
    assert scaling.TABLES[name]() in PAGE


def test_shapes_of_a_tiny_model_by_hand() -> None:
    assert TINY.matrices == {
        "q": (4, 4), "k": (2, 4), "v": (2, 4), "o": (4, 4), "gate": (6, 4), "up": (6, 4), "down": (4, 6),
    }  # fmt: skip
    assert TINY.block == 16 + 8 + 8 + 16 + 3 * 24
    assert scaling.grams(TINY, 10) == 2 * 10 * (3 * 16 + 36)
    assert scaling.gram(5000, 10) == 2 * 10 * (2048 * 2048 + 2048 * 4096 + (5000 - 4096) * 5000)
    assert scaling.gram_bytes(TINY) == 4 * (3 * 16 + 36)
    used = (16 + 8) + (16 + 8 + 8 + 16) + (48 + 24) + TINY.block
    assert TINY.passes == pytest.approx(2 * used / TINY.block + 2)


def test_parameters_are_those_the_models_are_called_by() -> None:
    billions = [model.parameters / 1e9 for model in scaling.MODELS]
    assert billions == pytest.approx([6.74, 70.6, 405.9], rel=0.002)


def test_matrices_are_dealt_to_whoever_has_least() -> None:
    assert scaling.owned(TINY, ["down", "gate", "up", "q"], 2) == [["down"], ["gate", "up", "q"]]
    assert sorted(name for own in scaling.owned(TINY, list(TINY.matrices), 64) for name in own) == sorted(TINY.matrices)


@pytest.mark.parametrize("two", [False, True])
def test_more_gpus_never_take_longer_but_for_traffic_and_down_bounds_them(two: bool) -> None:
    device, model = scaling.DEVICES[1], scaling.MODELS[1]
    one, eight, many = (scaling.one_shot(model, two, gpus, device) for gpus in (1, 8, 64))
    assert one.forward / eight.forward == pytest.approx(8) and one.grams / many.grams == pytest.approx(64)
    assert one.solve > eight.solve >= many.solve
    assert one.traffic == 0 < eight.traffic < many.traffic
    down = scaling.load(model, ["down"], scaling.ADMM if two else scaling.SPARSEGPT, device, 1)
    assert down <= many.solve
