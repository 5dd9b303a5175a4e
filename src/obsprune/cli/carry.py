"""What `prune` and `train-prune` do alike once their flags are a recipe: show the plan, or carry it out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obsprune.cli.console import Watch, err, tell
from obsprune.errors import InputError, OutputError, redacted

if TYPE_CHECKING:
    from obsprune.models.upload import Repository

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
    recipe says; speaks: whether this process is the one that tells; hub: where the result is uploaded to; told: has a
    thing done by the first of several processes, for all.
    """

    output: Path | None
    token: str | None
    dry_run: bool
    force: bool
    as_json: bool
    quiet: bool
    trusts: bool
    speaks: bool = True
    hub: Repository | None = None
    told: Callable[[Callable[[], None]], None] = lambda work: work()


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
        if way.speaks:
            tell(verb.describe(plan), verb.plan_tables(plan), way.as_json)
        return
    way.told(lambda: _check_hub(way, recipe.model.name))
    command = shlex.join(["obsprune", *_without_token(sys.argv[1:])])
    with Watch(way.quiet or way.as_json or not way.speaks) as watch:
        report = verb.run(recipe, output, watch, way.force, way.token, command)
    if way.speaks:
        tell(report, [] if way.quiet else verb.tables(_news(report, watch)), way.as_json)
        _upload(way, Path(report["output"]))


def _news(report: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """The report with those of its notes that were not told on the way."""
    return {**report, "warnings": [note for note in report["warnings"] if note not in watch.noticed]}


def _check_hub(way: Way, dense: str) -> None:
    """Before an hour is spent: raises InputError where the result could not be uploaded after it."""
    if way.hub is not None:
        way.hub.require_other(dense)
        way.hub.prepare()


def _upload(way: Way, output: Path) -> None:
    """Raises OutputError; the result stays."""
    if way.hub is None:
        return
    from obsprune.report.sharing import share

    try:
        with Watch(way.quiet or way.as_json) as watch:
            url = share(output, way.hub, watch)["url"]
    except InputError as error:
        again = ["obsprune", "push", str(output), way.hub.name, *(["--private"] if way.hub.private else [])]
        raise OutputError(f"{error}. The result in {output} is whole; upload it by: {shlex.join(again)}") from error
    if not way.quiet and not way.as_json:
        err.print(f"uploaded to {url}")


def given(**values: Any) -> dict[str, Any]:
    """What the user said: an empty section of a recipe must not replace one from a file."""
    return {key: value for key, value in values.items() if value is not None and value != {}}


def layers(config: Path | None, flags: dict[str, Any], settings: list[str] | None) -> list[dict[str, Any]]:
    """What a recipe is made of, later ones override earlier ones: a file's, the flags', and each `--set`'s tree. Raises
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
