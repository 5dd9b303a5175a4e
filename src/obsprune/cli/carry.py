"""What `prune` and `train-prune` do alike once their flags are a recipe: show the plan, or carry it out."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from obsprune.cli.console import Watch, err
from obsprune.errors import InputError

OUT = Path("obsprune-out")


@dataclass(frozen=True)
class Verb:
    """A command. plan: from recipe and token; describe, plan_tables: a plan for a machine, for a person; run: from
    recipe, output, watch, force, token and command line to the report; tables: of a report.
    """

    plan: Callable[[Any, str | None], Any]
    describe: Callable[[Any], dict[str, Any]]
    plan_tables: Callable[[Any], list[Any]]
    run: Callable[..., dict[str, Any]]
    tables: Callable[[dict[str, Any]], list[Any]]


@dataclass(frozen=True)
class Way:
    """How a command was asked to work, beside its recipe."""

    output: Path | None
    token: str | None
    dry_run: bool
    force: bool
    as_json: bool
    quiet: bool


def carry_out(verb: Verb, recipe: Any, way: Way) -> None:
    """The plan, or the run with its tables on stderr and the path of its result on stdout. Raises InputError."""
    if not recipe.model.name:
        raise InputError("no model given: name a directory or a Hugging Face id (prune also takes 'demo')")
    if way.dry_run:
        plan = verb.plan(recipe, way.token)
        _show(verb.plan_tables(plan), verb.describe(plan), way.as_json)
        return
    output = way.output or OUT / f"{Path(recipe.model.name).resolve().name}-{recipe.label}"
    command = shlex.join(["obsprune", *_without_token(sys.argv[1:])])
    with Watch(way.quiet or way.as_json) as watch:
        report = verb.run(recipe, output, watch, way.force, way.token, command)
    _show([] if way.quiet else verb.tables(report), report, way.as_json)
    if not way.as_json:
        typer.echo(report["output"])


def given(**values: Any) -> dict[str, Any]:
    """What the user said: an empty section of a recipe must not replace one from a file."""
    return {key: value for key, value in values.items() if value is not None and value != {}}


def _without_token(words: list[str]) -> list[str]:
    """The command line for the report, without a secret in it."""
    hidden = [index + 1 for index, word in enumerate(words) if word == "--token"]
    return ["***" if index in hidden or word.startswith("--token=") else word for index, word in enumerate(words)]


def _show(tables: list[Any], machine: dict[str, Any], as_json: bool) -> None:
    """The result, for a person or for a machine."""
    if as_json:
        typer.echo(json.dumps(machine, indent=1))
    else:
        for table in tables:
            err.print(table)
