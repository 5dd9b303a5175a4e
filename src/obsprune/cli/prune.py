"""`obsprune prune`: flags become a recipe, the pipeline does the work, the end is a table and a path."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obsprune.cli import options
from obsprune.cli.carry import Verb, Way, carry_out, given, layers
from obsprune.cli.console import quiet_libraries
from obsprune.cli.plan_tables import dry_run_tables
from obsprune.cli.push import repository
from obsprune.cli.tables import prune_tables

if TYPE_CHECKING:
    from obsprune.ranks import Ranks
    from obsprune.recipe import Recipe


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
    activations: options.Activations = None,
    output_dir: options.OutputDir = None,
    format_: options.Format = None,
    config: options.Config = None,
    set_: options.Set = None,
    skip: options.Skip = None,
    eval_: options.Eval = None,
    revision: options.Revision = None,
    token: options.Token = None,
    trust_remote_code: options.TrustRemoteCode = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune a language model or an image classifier and write a sparse checkpoint."""
    quiet_libraries()
    from obsprune.engine.distributed import processes

    flags = given(
        model=given(name=model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code or None),
        data=given(dataset=dataset, text_column=text_column, nsamples=nsamples, seqlen=seqlen),
        solver=given(name=solver),
        engine=given(device=device, batch_size=_number(batch_size), activations=activations),
        sparsity=sparsity,
        pattern=pattern,
        iters=iters,
        seed=seed,
        skip=skip,
        evaluation=eval_,
        format=format_,
    )
    with processes() as ranks:
        hub = ranks.agree(lambda: repository(push_to_hub, private, token))
        way = Way(output_dir, token, dry_run, force, json_, quiet, trust_remote_code, ranks.first, hub, ranks.told)
        recipe = ranks.agree(lambda: _asked(preset, config, flags, set_))
        carry_out(_verb(ranks), recipe, way)


def _asked(preset: str | None, config: Path | None, flags: dict[str, Any], settings: list[str] | None) -> Recipe:
    from obsprune.presets import layered

    trees = layered(preset, *layers(config, flags, settings))
    if flags.get("solver"):
        from obsprune.solvers import options as options_of

        options_of(flags["solver"]["name"])  # or InputError, before transformers is imported, which takes seconds
    from obsprune.recipe import make_recipe

    return make_recipe(*trees)


def _verb(ranks: Ranks) -> Verb:
    from obsprune import pipeline
    from obsprune.outlook import describe, look_ahead

    plan, run = partial(look_ahead, ranks=ranks), partial(pipeline.prune, ranks=ranks)
    return Verb(plan, describe, dry_run_tables, run, prune_tables)


def _number(text: str | None) -> int | str | None:
    return int(text) if text and text.lstrip("-").isdigit() else text
