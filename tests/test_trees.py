"""Words and files become trees of plain values, and trees dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from obsprune.errors import InputError
from obsprune.trees import merge, parse_setting, typed


@dataclass(frozen=True)
class Inner:
    size: float
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outer:
    inner: Inner
    seed: int = 0


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a.b=1", {"a": {"b": 1}}),
        ("a=1e-8", {"a": 1e-8}),
        ("a=-2E3", {"a": -2000.0}),
        ("a=e8", {"a": "e8"}),
        ("a=[1, x]", {"a": [1, "x"]}),
        ("a=", {"a": None}),
    ],
)
def test_a_setting_in_words(text: str, tree: dict[str, Any]) -> None:
    assert parse_setting(text) == tree


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", "a=[1"])
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_setting(text)


def test_a_dataclass_from_a_tree() -> None:
    assert typed(Outer, {"inner": {"size": 1, "names": ["x"]}}, "") == Outer(Inner(1, ["x"]))


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "'inner' is missing; Inner is expected"),
        ({"inner": {}}, "'inner.size' is missing; float is expected"),
        ({"inner": {"size": "x"}}, "'inner.size' is 'x'"),
        ({"inner": {"size": 1, "nams": []}}, "no key 'inner.nams'; did you mean names"),
        ({"inner": {"size": 1}, "seed": True}, "'seed' is True"),
        ({"inner": 3}, "a mapping with size, names is expected"),
    ],
)
def test_a_tree_that_does_not_fit(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        typed(Outer, tree, "")


def test_later_trees_win_and_another_solver_drops_options() -> None:
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    before = {"solver": {"name": "sparsegpt", "damping": 0.1}}
    assert merge(before, {"solver": {"name": "admm"}}) == {"solver": {"name": "admm"}}
    assert merge(before, {"solver": {"refit": 1}})["solver"] == {"name": "sparsegpt", "damping": 0.1, "refit": 1}
