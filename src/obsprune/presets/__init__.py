"""Presets: recipes that come with the package, by name. Plain YAML; `obsprune recipe show NAME` prints one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from obsprune.errors import InputError, nearest
from obsprune.trees import Tree, read_recipe

DEFAULT = "balanced"
"""The preset when nobody names a preset or a solver."""


def names() -> list[str]:
    """All presets."""
    return sorted(path.name.removesuffix(".yaml") for path in Path(str(files(__name__))).glob("*.yaml"))


def path_of(name: str) -> Path:
    """The file of a preset. Raises InputError."""
    if name not in names():
        raise InputError(f"unknown preset '{name}'; {nearest(name, names())}")
    return Path(str(files(__name__))) / f"{name}.yaml"


def layered(preset: str | None, config: Tree, *flags: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Recipe trees of growing priority. A preset that was asked for overrides the file, as flags do; the default one
    comes below the file, and only where neither file nor flags name a solver. Raises InputError.
    """
    if preset:
        return [config, read_recipe(path_of(preset)), *flags]
    solvers = [tree.get("solver") for tree in (config, *flags)]
    if any(not isinstance(solver, Mapping) or "name" in solver for solver in solvers if solver is not None):
        return [config, *flags]
    return [read_recipe(path_of(DEFAULT)), config, *flags]
