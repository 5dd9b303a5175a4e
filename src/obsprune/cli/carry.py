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
from obsprune.errors import InputError, redacted

OUT = Path("obsprune-out")


@dataclass(frozen=True)
class Verb:
    """A command. plan: from recipe, output, watch and token; describe, plan_tables: a plan for a machine, for a
    person; run: from recipe, output, watch, force, token and command line to the report; tables: of a report.
    """

    plan: Callable[..., Any]
    describe: Callable[[Any], dict[str, Any]]
    plan_tables: Callable[[Any], list[Any]]
    run: Callable[..., dict[str, Any]]
    tables: Callable[[dict[str, Any]], list[Any]]


@dataclass(frozen=True)
class Way:
    """How a command was asked to work, beside its recipe. trusts: the user lets the checkpoint's code run, whatever the
    recipe says; speaks: whether this process is the one that tells.
    """

    output: Path | None
    token: str | None
    dry_run: bool
    force: bool
    as_json: bool
    quiet: bool
    trusts: bool
    speaks: bool = True


def carry_out(verb: Verb, recipe: Any, way: Way) -> None:
    """The plan, or the run with its tables on stderr and the path of its result on stdout. Raises InputError."""
    if not recipe.model.name:
        raise InputError("no model given: name a directory or a Hugging Face id (prune also takes 'demo')")
    if recipe.model.trust_remote_code and not way.trusts:
        raise InputError(f"the recipe wants code that comes with {recipe.model.name} to run: add --trust-remote-code")
    output = way.output or OUT / f"{Path(recipe.model.name).resolve().name}-{recipe.label}"
    if way.dry_run:
        with Watch(way.quiet or way.as_json or not way.speaks) as watch:
            plan = verb.plan(recipe, output, watch, way.token)
        _show(verb.plan_tables(plan), verb.describe(plan), way)
        return
    command = shlex.join(["obsprune", *_without_token(sys.argv[1:])])
    with Watch(way.quiet or way.as_json or not way.speaks) as watch:
        report = verb.run(recipe, output, watch, way.force, way.token, command)
    _show([] if way.quiet else verb.tables(report), report, way)
    if way.speaks and not way.as_json:
        typer.echo(report["output"])


def given(**values: Any) -> dict[str, Any]:
    """What the user said: an empty section of a recipe must not replace one from a file."""
    return {key: value for key, value in values.items() if value is not None and value != {}}


def layers(config: Path | None, flags: dict[str, Any], settings: list[str] | None) -> list[dict[str, Any]]:
    """What a recipe is made of, the later before the earlier: a file's, the flags', and each `--set`'s tree. Raises
    InputError.
    """
    from obsprune.trees import parse_setting, read_recipe

    later = [parse_setting(text) for text in settings or []]
    return [read_recipe(config) if config else {}, flags, *later]


def _without_token(words: list[str]) -> list[str]:
    """The command line for the report, without a secret in it."""
    hidden = [index + 1 for index, word in enumerate(words) if word == "--token"]
    told = ("--token=***" if word.startswith("--token=") else word for word in words)
    return ["***" if index in hidden else redacted(word) for index, word in enumerate(told)]


def _show(tables: list[Any], machine: dict[str, Any], way: Way) -> None:
    """The result, for a person or for a machine."""
    if way.speaks and way.as_json:
        typer.echo(json.dumps(machine, indent=1))
    for table in tables if way.speaks and not way.as_json else []:
        err.print(table)
