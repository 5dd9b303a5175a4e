"""`obsprune prune`: flags become a recipe, the pipeline does the work, the end is a table and a path."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import typer

from obsprune.cli import options
from obsprune.cli.console import Watch, err, quiet_libraries
from obsprune.cli.tables import dry_run_tables, prune_tables
from obsprune.errors import InputError

OUT = Path("obsprune-out")


def prune(
    model: options.Model = None,
    sparsity: options.Sparsity = None,
    pattern: options.Pattern = None,
    preset: options.Preset = None,
    solver: options.Solver = None,
    iters: options.Iters = None,
    dataset: options.Dataset = None,
    text_column: options.TextColumn = None,
    nsamples: options.Nsamples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    batch_size: options.BatchSize = None,
    output_dir: options.OutputDir = None,
    config: options.Config = None,
    set_: options.Set = None,
    skip: options.Skip = None,
    eval_: options.Eval = None,
    revision: options.Revision = None,
    token: options.Token = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune a language model or an image classifier and write a sparse checkpoint."""
    quiet_libraries()
    from obsprune import pipeline
    from obsprune.plan import describe, make_plan
    from obsprune.presets import layered
    from obsprune.recipe import make_recipe
    from obsprune.trees import parse_setting, read_recipe

    flags = given(
        model=given(name=model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code or None),
        data=given(dataset=dataset, text_column=text_column, nsamples=nsamples, seqlen=seqlen),
        solver=given(name=solver),
        engine=given(device=device, batch_size=_number(batch_size)),
        sparsity=sparsity,
        pattern=pattern,
        iters=iters,
        seed=seed,
        skip=skip,
        evaluation=eval_,
    )
    settings = [parse_setting(text) for text in set_ or []]
    recipe = make_recipe(*layered(preset, read_recipe(config) if config else {}, flags, *settings))
    if not recipe.model.name:
        raise InputError("no model given: name a directory, a Hugging Face id, or 'demo'")
    output = output_dir or OUT / f"{Path(recipe.model.name).resolve().name}-{recipe.label}"
    if dry_run:
        plan = make_plan(recipe, token)
        show(dry_run_tables(plan), describe(plan), json_)
        return
    with Watch(quiet or json_) as watch:
        report = pipeline.prune(
            recipe, output, watch, force, token, shlex.join(["obsprune", *without_token(sys.argv[1:])])
        )
    show([] if quiet else prune_tables(report), report, json_)
    if not json_:
        typer.echo(report["output"])


def given(**values: Any) -> dict[str, Any]:
    """What the user said: an empty section of a recipe must not replace one from a file."""
    return {key: value for key, value in values.items() if value is not None and value != {}}


def _number(text: str | None) -> int | str | None:
    return int(text) if text and text.lstrip("-").isdigit() else text


def without_token(words: list[str]) -> list[str]:
    """The command line for the report, without a secret in it."""
    hidden = [index + 1 for index, word in enumerate(words) if word == "--token"]
    return ["***" if index in hidden or word.startswith("--token=") else word for index, word in enumerate(words)]


def show(tables: list[Any], machine: dict[str, Any], as_json: bool) -> None:
    """The result, for a person or for a machine."""
    if as_json:
        typer.echo(json.dumps(machine, indent=1))
    else:
        for table in tables:
            err.print(table)
