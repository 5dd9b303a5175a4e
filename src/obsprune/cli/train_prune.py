"""`obsprune train-prune`: flags become a recipe, the pipeline prunes and retrains, the end is a table and a path."""

from __future__ import annotations

from obsprune.cli import options
from obsprune.cli.carry import Verb, Way, carry_out, given, layers
from obsprune.cli.console import quiet_libraries
from obsprune.cli.plan_tables import training_dry_run_tables
from obsprune.cli.push import repository
from obsprune.cli.tables import training_tables


def train_prune(
    model: options.TrainModel = None,
    sparsity: options.TrainSparsity = None,
    method: options.Method = None,
    curvature: options.Curvature = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    lr: options.Rate = None,
    batch_size: options.TrainBatchSize = None,
    dataset: options.TrainDataset = None,
    nsamples: options.Scored = None,
    seed: options.TrainSeed = None,
    dtype: options.TrainDtype = None,
    device: options.Device = None,
    output_dir: options.OutputDir = None,
    config: options.Config = None,
    set_: options.TrainSet = None,
    skip: options.Skip = None,
    eval_: options.TrainEval = None,
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
    """Prune an image classifier in steps, retrain it after each, and write a sparse checkpoint."""
    quiet_libraries()
    from obsprune.engine.distributed import alone
    from obsprune.training_recipe import make_training

    alone("train-prune")
    flags = given(
        model=given(name=model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code or None),
        data=given(dataset=dataset, nsamples=nsamples),
        training=given(method=method, curvature=curvature, steps=steps, epochs=epochs, lr=lr, batch_size=batch_size),
        sparsity=sparsity,
        device=device,
        seed=seed,
        skip=skip,
        evaluation=eval_,
    )
    recipe = make_training(*layers(config, flags, set_))
    hub = repository(push_to_hub, private, token)
    way = Way(output_dir, token, dry_run, force, json_, quiet, trust_remote_code, hub=hub)
    carry_out(_verb(), recipe, way)


def _verb() -> Verb:
    from obsprune import train_pipeline

    return Verb(
        lambda recipe, output, watch, token: train_pipeline.make_training_plan(recipe, token),
        train_pipeline.describe,
        training_dry_run_tables,
        train_pipeline.train_prune,
        training_tables,
    )
