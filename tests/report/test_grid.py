"""Depth across, kind down."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from obsprune.report.grid import Cell, depths_of, kind_of, make_grid


@pytest.mark.parametrize(
    ("block", "inside", "kind", "depth"),
    [
        ("model.layers.12", "self_attn.q_proj", "self_attn.q_proj", "12"),
        ("vit.encoder.layer.3", "attention.attention.query", "attention.attention.query", "3"),
        ("transformer.h.0", "attn.c_attn", "attn.c_attn", "0"),
        ("model.layers.5", "mlp.experts.7.gate_proj", "mlp.experts.*.gate_proj", "5"),
        ("model.layers.5", "mlp.shared_experts.gate_proj", "mlp.shared_experts.gate_proj", "5"),
        ("resnet.encoder.stages.1.layers.2", "layer.0.convolution", "layer.0.convolution", "1.2"),
        ("resnet.encoder.stages.0.layers.0", "shortcut.convolution", "shortcut.convolution", "0.0"),
        ("swin.encoder.layers.2.blocks.11", "attention.q_proj", "attention.q_proj", "2.11"),
        ("regnet.encoder.stages.0.layers.1", "layer.1.convolution[3]", "layer.1.convolution", "0.1"),
        ("mobilenet_v2.layer.3", "conv_3x3.convolution[0]", "conv_3x3.convolution", "3"),
        ("model2.body", "first.dense", "first.dense", "model2.body"),
    ],
)
def test_a_name_is_a_kind_at_a_depth(block: str, inside: str, kind: str, depth: str) -> None:
    assert kind_of(f"{block}.{inside}", block) == kind
    assert depths_of([block]) == {block: depth}


def test_a_block_that_is_a_matrix_and_a_name_elsewhere() -> None:
    assert kind_of("features.3", "features.3") == "3"
    assert kind_of("head.out", "layers.0") == "head.out"


def test_two_stacks_are_told_apart() -> None:
    blocks = ["text.layers.0", "text.layers.1", "vision.layers.0"]
    assert depths_of(blocks) == {block: block for block in blocks}
    assert depths_of(blocks[:2]) == {"text.layers.0": "0", "text.layers.1": "1"}


def entry(depth: int, kind: str, error: float | None, shape: tuple[int, int] = (2, 3)) -> dict[str, Any]:
    return {"block": f"layers.{depth}", "name": f"layers.{depth}.{kind}", "shape": list(shape), "error": error}


def test_experts_are_one_cell_by_their_weights() -> None:
    values = [0.1, 0.4, 0.2]
    shapes = [(2, 3), (4, 3), (2, 9)]
    experts = [entry(0, f"experts.{i}.up", v, s) for i, (v, s) in enumerate(zip(values, shapes, strict=True))]
    grid = make_grid([*experts, entry(0, "dense", 0.5)], "error")
    assert grid.kinds == ("experts.*.up", "dense") and grid.depths == ("0",)
    cell = grid.cells["experts.*.up", "0"]
    assert cell.value == pytest.approx((0.1 * 6 + 0.4 * 12 + 0.2 * 18) / 36)
    assert (cell.most, cell.which, cell.weights, cell.count) == (0.4, "layers.0.experts.1.up", 36, 3)


def test_places_without_a_matrix_and_matrices_without_a_value() -> None:
    told = [entry(0, "a", 0.1), entry(1, "a", 0.2), entry(1, "b", 0.3), entry(2, "b", None)]
    del told[1]["error"]
    grid = make_grid(told, "error")
    assert grid.kinds == ("a", "b") and grid.depths == ("0", "1")
    assert set(grid.cells) == {("a", "0"), ("b", "1")}
    assert make_grid(told, "sparsity").cells == {}


@pytest.mark.parametrize(("depths", "most", "columns", "labels"), [
    (5, 5, 5, ["0", "4"]), (5, 4, 3, ["0–1", "4"]), (126, 50, 42, ["0–2", "123–125"]), (3, 1, 1, ["0–2"]),
])  # fmt: skip
def test_folding_keeps_what_there_is(depths: int, most: int, columns: int, labels: list[str]) -> None:
    grid = make_grid([entry(depth, kind, depth / 10) for depth in range(depths) for kind in "ab"], "error")
    folded = grid.folded(most)
    assert len(folded.depths) == columns and [folded.depths[0], folded.depths[-1]] == [labels[0], labels[-1]]
    assert sum(cell.count for cell in folded.cells.values()) == 2 * depths
    whole, parts = _sum(grid.cells.values()), _sum(folded.cells.values())
    assert parts.value == pytest.approx(whole.value) and (parts.most, parts.weights) == (whole.most, whole.weights)


def _sum(cells: Iterable[Cell]) -> Cell:
    first, *others = cells
    for cell in others:
        first = first + cell
    return first
