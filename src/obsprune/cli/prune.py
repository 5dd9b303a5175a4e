"""`obsprune prune`: flags become a recipe, the pipeline does the work, the end is a table and a path."""

from __future__ import annotations

from functools import partial

from obsprune.cli import options
from obsprune.cli.carry import Verb, Way, carry_out, given
from obsprune.cli.console import quiet_libraries
from obsprune.cli.plan_tables import dry_run_tables
from obsprune.cli.tables import prune_tables


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
    from obsprune.engine.distributed import processes
    from obsprune.outlook import describe, look_ahead
    from obsprune.presets import layered
    from obsprune.recipe import Recipe, make_recipe
    from obsprune.trees import parse_setting, read_recipe

    def asked() -> Recipe:
        settings = [parse_setting(text) for text in set_ or []]
        return make_recipe(*layered(preset, read_recipe(config) if config else {}, flags, *settings))

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
    )
    with processes() as ranks:
        plan, run = partial(look_ahead, ranks=ranks), partial(pipeline.prune, ranks=ranks)
        verb = Verb(plan, describe, dry_run_tables, run, prune_tables)
        way = Way(output_dir, token, dry_run, force, json_, quiet, trust_remote_code, ranks.first)
        carry_out(verb, ranks.agree(asked), way)


def _number(text: str | None) -> int | str | None:
    return int(text) if text and text.lstrip("-").isdigit() else text
