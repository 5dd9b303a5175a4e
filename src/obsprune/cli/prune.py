"""`obsprune prune`: flags become a recipe, the pipeline does the work, the end is a table and a path."""

from __future__ import annotations

from obsprune.cli import options
from obsprune.cli.carry import Verb, Way, carry_out, given
from obsprune.cli.console import quiet_libraries
from obsprune.cli.tables import dry_run_tables, prune_tables


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
    verb = Verb(make_plan, describe, dry_run_tables, pipeline.prune, prune_tables)
    carry_out(verb, recipe, Way(output_dir, token, dry_run, force, json_, quiet))


def _number(text: str | None) -> int | str | None:
    return int(text) if text and text.lstrip("-").isdigit() else text
