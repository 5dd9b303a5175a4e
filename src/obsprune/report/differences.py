"""What was asked of runs, and with what they worked, where that is not the same in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from obsprune.report.report import Report
from obsprune.report.runs import Run, Tree
from obsprune.report.sections import command

PARTS = {"recipe": "recipe", "data": "data", "model": "machine", "versions": "versions"}
"""Parts of a report that may differ, and as what; of `model` only what COMPUTED names."""
COMPUTED = ("compute_dtype", "device")


@dataclass(frozen=True)
class Difference:
    """A setting or fact that is not the same in all runs; values: of those that have it."""

    part: str
    key: str
    values: Tree


def differences(runs: Sequence[Run]) -> list[Difference]:
    """The command, then settings, then what they were read with, then machines and versions."""
    commands = {run.name: command(run.report) for run in runs}
    found = [Difference("recipe", "command", commands)] if len(set(commands.values())) > 1 else []
    for part, called in PARTS.items():
        trees = {run.name: _part(run.report, part) for run in runs}
        flat = {name: _flat(tree) for name, tree in trees.items()}
        for key in dict.fromkeys(key for tree in flat.values() for key in tree):
            values = {name: tree[key] for name, tree in flat.items() if key in tree}
            could = [name for name, tree in trees.items() if key.partition(".")[0] in tree]  # others: another command
            if len(values) < len(could) or any(value != next(iter(values.values())) for value in values.values()):
                found.append(Difference(called, key, values))
    return found


def _part(report: Report, part: str) -> Tree:
    tree: Tree = report.get(part, {})
    return {key: tree[key] for key in COMPUTED} if part == "model" else tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """{a: {b: 1}} -> {a.b: 1}"""
    flat: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
