"""Trees of plain values: read from YAML, set from words, laid over one another, and turned into dataclasses."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from obsprune.errors import InputError, nearest

Tree = dict[str, Any]
LONGEST = 2**20
"""Bytes of a recipe."""
DEEPEST = 50
"""Lists and mappings inside one another."""
EXPONENT = re.compile(r"[+-]?\d+e[+-]?\d+", re.IGNORECASE)


def read_recipe(path: Path) -> Tree:
    """The tree of a YAML file. Raises InputError when there is no such file or it is no mapping."""
    try:
        if not path.is_file():
            raise InputError(f"there is no recipe {path}")
        if path.stat().st_size > LONGEST:
            raise InputError(f"{path} is no recipe: it has {path.stat().st_size:,} bytes, more than {LONGEST:,}")
        tree = _values(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no recipe: a mapping such as 'sparsity: 0.5' is expected")
    return tree


def _values(text: str) -> Any:
    """The plain values of a YAML text: no objects, and nothing by reference, which can make a small text an endless
    tree. Raises ValueError.
    """
    try:
        _check_events(yaml.parse(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except Exception as error:  # the values of its tags (dates, numbers, sets) fail in many ways
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _check_events(events: Iterable[yaml.Event]) -> None:
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"the alias *{event.anchor}; write the value out")
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")


def parse_setting(text: str) -> Tree:
    """`solver.damping=0.02` -> {solver: {damping: 0.02}}. Raises InputError."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise InputError(f"--set {text}: expected KEY=VALUE, such as solver.damping=0.02")
    try:
        tree = _values(value)
    except ValueError as error:
        raise InputError(f"--set {text}: the value is not YAML ({error})") from error
    if EXPONENT.fullmatch(value):
        tree = float(value)  # YAML 1.1 takes 1e-8, which has no point, for a word
    for name in reversed(path.split(".")):
        tree = {name: tree}
    return dict(tree)


def merge(*trees: Mapping[str, Any]) -> Tree:
    """Later trees override earlier ones, key by key. A `solver` of another name drops the options of the one before."""
    result: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            before = result.get(key)
            if isinstance(value, Mapping) and isinstance(before, Mapping):
                other = key == "solver" and value.get("name", before.get("name")) != before.get("name")
                result[key] = dict(value) if other else merge(before, value)
            else:
                result[key] = value
    return result


def typed(kind: Any, tree: Any, path: str) -> Any:
    """A dataclass from a tree; unknown and missing keys and wrong types are refused by path. Raises InputError."""
    if not isinstance(tree, Mapping):
        known = ", ".join(f.name for f in fields(kind))
        raise InputError(f"'{path.removesuffix('.')}' is {tree!r}; a mapping with {known} is expected")
    hints = get_type_hints(kind)
    values: Tree = {}
    for key, value in tree.items():
        if key not in hints:
            raise InputError(f"a recipe has no key '{path}{key}'; {nearest(str(key), hints)}")
        values[key] = typed(hints[key], value, f"{path}{key}.") if dataclasses.is_dataclass(hints[key]) else value
        if not dataclasses.is_dataclass(hints[key]) and not fits(value, hints[key]):
            raise InputError(f"'{path}{key}' is {value!r}; {_name(hints[key])} is expected")
    for part in fields(kind):
        if part.name not in values and part.default is part.default_factory is dataclasses.MISSING:
            raise InputError(f"'{path}{part.name}' is missing; {_name(hints[part.name])} is expected")
    return kind(**values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type, as annotations write it."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    kind = get_origin(hint) or hint
    return isinstance(value, (int, float) if kind is float else kind)


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
