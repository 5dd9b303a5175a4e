"""The config of a checkpoint, read before anything is made by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from obsprune.errors import InputError, first_line
from obsprune.models.caution import read_json
from obsprune.models.checkpoint import CONFIG

MOST = 10_000
"""Modules of a kind: no model has so many, and making them one by one would never end."""


@dataclass(frozen=True)
class Rule:
    """What a config may say. key: where in a key it is looked for; allows: whether a value will do; says: what is said
    of any other, with {directory}, {path}, {key} and {value}.
    """

    key: str
    allows: Callable[[Any], bool]
    says: str


def _countable(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return not any(isinstance(count, int) and count > MOST for count in values)


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


RULES = (
    Rule(
        r"^(quantization|compression)_config\Z",
        lambda value: not value,
        "{directory} is quantised; prune the unquantised checkpoint it was made from",
    ),
    Rule(
        "(layers?|experts?|depths?)$",  # how keys end that say how many modules are made
        _countable,
        f"{{path}}: {{key}} is {{value!r}}, and no model has more than {MOST:,} of them",
    ),
    Rule(r"^architectures\Z", _is_names, "{path}: {key} is {value!r}; a list of names is expected"),
    Rule(
        r"^auto_map\Z",
        lambda value: isinstance(value, dict | None),
        "{path}: {key} is {value!r}; a mapping is expected",
    ),
)
"""Of what transformers would pass on as it is, or never come to an end with."""


def read_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """The config of a model. Raises InputError when it is damaged or quantised."""
    path = directory / CONFIG
    for key, value in _entries(read_json(path)):
        _check(directory, key, value)
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # remote code, unknown architectures and impossible values all end here
        raise InputError(f"{path} cannot be used: {first_line(error)}") from error


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values, those of configs inside the config too."""
    if isinstance(tree, dict):
        yield from tree.items()
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _entries(part)


def _check(directory: Path, key: str, value: Any) -> None:
    """Raises InputError for the first rule that a value breaks."""
    for rule in RULES:
        if re.search(rule.key, key) and not rule.allows(value):
            raise InputError(rule.says.format(directory=directory, path=directory / CONFIG, key=key, value=value))
