"""`obsprune finetune`: flags become a recipe, the pipeline trains what is not zero, the end is a table and a path."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from obsprune.cli import options
from obsprune.cli.carry import Verb, Way, carry_out, given, layers
from obsprune.cli.console import quiet_libraries
from obsprune.cli.finetune_tables import finetune_dry_run_tables, finetune_tables
from obsprune.cli.push import repository

if TYPE_CHECKING:
    from obsprune.ranks import Ranks

Option = typer.Option
Sparse = Annotated[
    str | None, typer.Argument(help="A sparse checkpoint: a result of obsprune, or another one.", show_default=False)
]
Teacher = Annotated[
    str | None, Option(metavar="DENSE", help="The dense model to distil from. (default: none, the next token alone)")
]
Steps = Annotated[int | None, Option(help="Optimizer steps. (default: 300)")]
BatchSize = Annotated[
    int | None, Option(help="Sequences or images of a step, of all processes together. (default: 16)")
]
Rate = Annotated[float | None, Option("--lr", help="AdamW's, at its highest. (default: 0.128 / width of the model)")]
Warmup = Annotated[float | None, Option(help="Share of the steps in which the rate rises. (default: 0.05)")]
Distill = Annotated[
    float | None, Option(help="The teacher's share of the loss; the next token has the rest. (default: 1)")
]
Temperature = Annotated[float | None, Option(help="Of the teacher's and the student's answers. (default: 1)")]
Every = Annotated[
    int | None,
    Option("--checkpoint-every", help="Steps between two looks at what is held out. (default: a tenth of all)"),
]
Checkpointing = Annotated[
    bool, Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them.")
]
Nsamples = Annotated[
    int | None, Option(help="Sequences or images to train on. (default: as many as the steps take, or all there are)")
]
Dataset = Annotated[
    str | None,
    Option(help="To train on: as of obsprune prune. Some of it is held out, and chooses the best step. (default: c4)"),
]
Seed = Annotated[int | None, Option(help="Draws and orders the samples; same seed, same bytes. (default: 0)")]
Dtype = Annotated[
    str | None,
    Option(help="Of the forward passes; weights are float32. (default: auto, bfloat16 on a GPU, else float32)"),
]
Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other setting of the recipe.yaml of a result: tuning.at_once=4, tuning.decay=0.01, data.heldout=64. "
        "Repeatable.",
    ),
]


def finetune(
    model: Sparse = None,
    dataset: Dataset = None,
    steps: Steps = None,
    teacher: Teacher = None,
    lr: Rate = None,
    batch_size: BatchSize = None,
    seqlen: options.Seqlen = None,
    nsamples: Nsamples = None,
    warmup: Warmup = None,
    distill: Distill = None,
    temperature: Temperature = None,
    checkpoint_every: Every = None,
    gradient_checkpointing: Checkpointing = False,
    text_column: options.TextColumn = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: options.Device = None,
    output_dir: options.OutputDir = None,
    config: options.Config = None,
    set_: Set = None,
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
    """Train a sparse checkpoint, with the dense model as its teacher; its zeros stay exactly zero."""
    quiet_libraries()
    from obsprune.engine.distributed import processes
    from obsprune.finetune_recipe import make_finetuning

    flags = given(
        model=given(name=model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code or None),
        data=given(dataset=dataset, text_column=text_column, nsamples=nsamples, seqlen=seqlen),
        tuning=given(
            teacher=teacher, steps=steps, batch_size=batch_size, lr=lr, warmup=warmup, distill=distill,
            temperature=temperature, every=checkpoint_every, checkpointing=gradient_checkpointing or None,
        ),
        device=device,
        seed=seed,
        evaluation=eval_,
    )  # fmt: skip
    with processes() as ranks:
        hub = ranks.agree(lambda: repository(push_to_hub, private, token))
        way = Way(output_dir, token, dry_run, force, json_, quiet, trust_remote_code, ranks.first, hub, ranks.told)
        recipe = ranks.agree(lambda: make_finetuning(*layers(config, flags, set_)))
        carry_out(_verb(ranks), recipe, way)


def _verb(ranks: Ranks) -> Verb:
    from obsprune import finetune_pipeline

    return Verb(
        lambda recipe, output, watch, token: finetune_pipeline.make_finetune_plan(recipe, token, ranks),
        finetune_pipeline.describe,
        finetune_dry_run_tables,
        partial(finetune_pipeline.finetune, ranks=ranks),
        finetune_tables,
    )
