"""The config of a checkpoint, read before anything is made by it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from obsprune.errors import InputError, first_line
from obsprune.models.caution import read_json
from obsprune.models.checkpoint import CONFIG

COUNTS = re.compile(r"(layers?|experts?|depths?)$")
"""How keys end that say how many modules are made."""
MOST = 10_000
"""Modules of a kind: no model has so many, and making them one by one would never end."""
QUANTISED = ("quantization_config", "compression_config")


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
    """What transformers would pass on as it is, or never come to an end with."""
    if key in QUANTISED and value:
        raise InputError(f"{directory} is quantised; prune the unquantised checkpoint it was made from")
    values = value if isinstance(value, list) else [value]
    if COUNTS.search(key) and any(isinstance(count, int) and count > MOST for count in values):
        raise InputError(f"{directory / CONFIG}: {key} is {value!r}, and no model has more than {MOST:,} of them")
    named = value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))
    if key == "architectures" and not named:
        raise InputError(f"{directory / CONFIG}: {key} is {value!r}; a list of names is expected")
    if key == "auto_map" and not isinstance(value, dict | None):
        raise InputError(f"{directory / CONFIG}: {key} is {value!r}; a mapping is expected")
