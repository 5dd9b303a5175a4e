"""What blocks cost beside one another, before they are pruned."""

from __future__ import annotations

import pytest
from zoo import Zoo, pixel_batches, token_batches

from obsprune.engine.effort import HELD, SWEPT, efforts
from obsprune.engine.preflight import check_walk
from obsprune.models.load import load
from obsprune.progress import Silent


def test_equal_blocks_cost_the_same_and_every_token_counts(zoo: Zoo) -> None:
    model = load(str(zoo("llama")))
    (batch,) = token_batches(1, size=1, length=24)
    entered = check_walk(model, batch, Silent())
    assert entered == {matrix.name: 24 for matrix in model.matrices}
    costs = efforts(model, entered)
    assert len(set(costs)) == 1 and len(costs) == 3
    block = model.blocks[0]
    numbers = sum(parameter.numel() for parameter in block.module.parameters())
    shapes = [matrix.shape for matrix in block.matrices]
    expected = numbers + sum((24 * c * (r + c + HELD)) + SWEPT * c * c * (r + c) for r, c in shapes)
    assert costs[0] == pytest.approx(expected, rel=1e-2)
    assert efforts(model, {name: 10 * count for name, count in entered.items()})[0] > 5 * costs[0]


def test_stages_of_a_classifier_differ(zoo: Zoo) -> None:
    model = load(str(zoo("swin")))
    (batch,) = pixel_batches(1, size=1)
    entered = check_walk(model, batch, Silent())
    first, *second = efforts(model, entered)
    tokens = {name: count for name, count in entered.items() if name.endswith("mlp.fc1")}
    assert list(tokens.values()) == [64, 16, 16]  # patches merged four by four
    assert len(set(second)) == 1 and first != second[0]


def test_tokens_are_dealt_out_among_experts(zoo: Zoo) -> None:
    model = load(str(zoo("mixtral")))
    (batch,) = token_batches(1, size=1, length=24)
    entered = check_walk(model, batch, Silent())
    gates = [count for name, count in entered.items() if ".layers.0." in name and name.endswith("gate_proj")]
    assert sum(gates) == 24 * 2  # two of the experts each
    assert len(set(efforts(model, entered))) == 1


def test_a_block_without_matrices_costs_something(zoo: Zoo) -> None:
    model = load(str(zoo("mobilenet_v1")))
    assert min(efforts(model, {})) > 0
