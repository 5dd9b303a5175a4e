"""Two models on the same items."""

from __future__ import annotations

import math

import pytest
import torch

from obsprune.evaluate.paired import beside, paired


def test_definition() -> None:
    first, second = [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    found = paired({"acc": first, "other": [1.0]}, {"acc": second, "loss": [1.0]})
    assert list(found) == ["acc"]
    assert found["acc"] == pytest.approx({"difference": 0, "stderr": math.sqrt(2 / 3) / 2, "p": 1.0, "items": 4})


def test_the_pairing_takes_out_what_both_share() -> None:
    """A difference far smaller than the spread of the items, and yet certain."""
    torch.manual_seed(0)
    items = torch.randn(400).double() * 10
    found = paired({"nll": (items + 0.1).tolist()}, {"nll": items.tolist()})["nll"]
    assert found["difference"] == pytest.approx(0.1) and found["p"] < 1e-6
    noise = paired({"nll": items.tolist()}, {"nll": items[torch.randperm(400)].tolist()})["nll"]
    assert noise["p"] > 0.05


def test_p_is_uniform_where_nothing_differs() -> None:
    torch.manual_seed(0)
    found = [paired({"x": torch.randn(50).tolist()}, {"x": torch.randn(50).tolist()})["x"]["p"] for _ in range(400)]
    assert 0.02 < sum(p < 0.05 for p in found) / 400 < 0.09


def test_the_same_twice_and_a_constant_difference() -> None:
    assert paired({"x": [1.0, 2.0]}, {"x": [1.0, 2.0]})["x"]["p"] == 1
    assert paired({"x": [2.0, 3.0]}, {"x": [1.0, 2.0]})["x"]["p"] == 0.5  # two items can show no more


def test_few_differences_are_counted_exactly_however_many_items_agree() -> None:
    items, others = [1.0] * 4 + [0.0] * 400, [0.0] * 404
    found = paired({"top1": items}, {"top1": others})["top1"]
    assert found["items"] == 404 and found["p"] == pytest.approx(2 / 16)  # the sign test: four heads or four tails


def test_more_differences_than_can_be_listed() -> None:
    """Thirty that all go one way, and a mixture, against the binomial distribution."""
    assert paired({"x": [1.0] * 30}, {"x": [0.0] * 30})["x"]["p"] < 1e-3
    signs = [1.0] * 20 + [-1.0] * 10
    exact = 2 * sum(math.comb(30, k) for k in range(20, 31)) / 2**30
    assert paired({"x": signs}, {"x": [0.0] * 30})["x"]["p"] == pytest.approx(exact, abs=0.01)


def test_only_perplexities_have_a_ratio() -> None:
    assert beside({"perplexity": 6.0}, {"perplexity": 4.0}) == {"ratio": 1.5}
    assert beside({"top1": 6.0}, {"top1": 4.0}) == {}
