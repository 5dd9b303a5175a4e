"""The flags, each once: commands share them by type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Option = typer.Option

# What is pruned or measured
Model = Annotated[
    str | None, typer.Argument(help="A local directory, a Hugging Face id, or 'demo'.", show_default=False)
]
Revision = Annotated[str | None, Option(help="Branch, tag or commit on the hub.")]
Token = Annotated[str | None, Option(help="Access token for the hub (or HF_TOKEN).", show_default=False)]
TrustRemoteCode = Annotated[bool, Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Dtype = Annotated[
    str | None, Option(help="Of the forward passes: auto, float32, bfloat16, float16. (default: auto, as stored)")
]
Device = Annotated[str | None, Option(help="auto, cpu, cuda, cuda:1, … (default: auto)")]

# How sparse, and by which method
Sparsity = Annotated[float | None, Option(help="Share of zeros in [0, 1). (default: 0.5, or what n:m implies)")]
Pattern = Annotated[
    str | None,
    Option(
        help="unstructured, row, or n:m (n KEPT of every m inputs, such as 2:4). (default: unstructured; row for wanda)"
    ),
]
Solver = Annotated[
    str | None, Option(help="magnitude, wanda, sparsegpt, obc or admm, as published. (default: a preset)")
]
Preset = Annotated[
    str | None,
    Option(help="fast, balanced or best; see obsprune recipe. (default: balanced, unless a solver is named)"),
]
Iters = Annotated[
    int | None, Option(help="Rounds of I-OBS, each on new sequences; 1 is one shot. (default: 1; best: 3)")
]
Skip = Annotated[list[str] | None, Option(metavar="REGEX", help="Matrices whose name matches stay dense. Repeatable.")]
Config = Annotated[Path | None, Option(help="A recipe (YAML); flags override it.")]
Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other setting of a recipe: solver.refit=10, target=stream, matching.passes=5, rounds.tune=none; all "
        "are in docs/recipes.md and in the recipe.yaml of a result. Repeatable.",
    ),
]

# Pruning with retraining
TrainModel = Annotated[str | None, typer.Argument(help="A local directory or a Hugging Face id.", show_default=False)]
TrainEval = Annotated[
    list[str] | None,
    Option("--eval", metavar="TASK", help="imagenet=PATH, heldout, or none. Repeatable. (default: heldout, 64 images)"),
]
TrainSparsity = Annotated[float | None, Option("--sparsity", help="Share of zeros at the end. (default: 0.5)")]
Method = Annotated[
    str | None,
    Option(
        help="A layer solver, such as sparsegpt; or woodfisher, cbs, obd, taylor, first-order or magnitude, over all "
        "matrices together. "
        "(default: sparsegpt)"
    ),
]
Curvature = Annotated[
    str | None,
    Option(help="For taylor and obd: batch, sample, kfac or gauss-newton. (default: batch for taylor, sample for obd)"),
]
Steps = Annotated[int | None, Option(help="How often is pruned and retrained. (default: 10)")]
Epochs = Annotated[int | None, Option(help="Over the training images, after each pruning. (default: 1)")]
Rate = Annotated[float | None, Option("--lr", help="Adam's at the beginning of each step. (default: 1e-4)")]
TrainBatchSize = Annotated[int | None, Option("--batch-size", help="Images of an optimizer step. (default: 32)")]
TrainDataset = Annotated[
    str | None,
    Option(
        "--dataset",
        metavar="imagenet=PATH",
        help="Labelled images to train on: a tree with a folder a class, a labels file (path, class), a saved data set "
        "or its id.",
    ),
]
TrainSet = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other setting of the recipe.yaml of a result: data.heldout=64, training.norms=moving. Repeatable.",
    ),
]
Scored = Annotated[int | None, Option("--nsamples", help="Images that scores are measured on. (default: 256)")]
TrainSeed = Annotated[int | None, Option("--seed", help="Draws and shuffles; same seed, same bytes. (default: 0)")]
TrainDtype = Annotated[
    str | None,
    Option("--dtype", help="Of the forward passes: float32 or bfloat16; weights are float32. (default: float32)"),
]

# The data
Dataset = Annotated[
    str | None,
    Option(
        help="Calibration: wikitext2, c4, a .txt, .jsonl, .json, .csv or .parquet file, or FILE.safetensors[:TENSOR] "
        "of token ids (default: c4); for classifiers imagenet=PATH: a folder of images, a tree with a folder a class, "
        "a labels file (path, class), a saved data set or its id."
    ),
]
TextColumn = Annotated[str | None, Option(help="The column of a table that holds the text.")]
Nsamples = Annotated[int | None, Option(help="Calibration sequences or images. (default: 128 or 512)")]
Seqlen = Annotated[int | None, Option(help="Tokens a sequence. (default: 2048, at most the model's own maximum)")]
Seed = Annotated[int | None, Option(help="Draws the samples; the same seed gives the same bytes. (default: 0)")]
BatchSize = Annotated[str | None, Option(help="Samples in one forward, or auto. (default: auto)")]
Activations = Annotated[
    str | None,
    Option(
        help="Where those of waiting batches live: device, host, disk (of the output), or auto: the first with room. "
        "(default: auto)"
    ),
]

# Evaluation
Eval = Annotated[
    list[str] | None,
    Option(
        "--eval",
        metavar="TASK",
        help="heldout, wikitext2, c4, text=FILE, imagenet=PATH, mmlu[=PATH], another lm_eval task, or none. "
        "Repeatable. (default: heldout, and wikitext2 where it can be had)",
    ),
]
Task = Annotated[
    list[str] | None,
    Option(
        metavar="TASK",
        help="heldout, wikitext2, c4, text=FILE (.txt, a table, or FILE.safetensors:TENSOR), imagenet=PATH, "
        "mmlu[=PATH], or any task of lm_eval. Repeatable. (default: heldout for obsprune's results, else wikitext2)",
    ),
]
Compare = Annotated[str | None, Option(metavar="MODEL", help="Another model on the same tasks, and a paired test.")]
Limit = Annotated[
    int | None,
    Option(min=1, help="Only the first sequences, images or documents of each task; for mmlu, of each subject."),
]
NumFewshot = Annotated[
    int | None,
    Option(min=0, help="Solved examples before each question of mmlu and lm_eval's tasks. (default: 5 for mmlu)"),
]

# The run
OutputDir = Annotated[
    Path | None,
    Option("--output-dir", "-o", help="Where the result goes. (default: ./obsprune-out/<model>-<what>)"),
]
Format = Annotated[
    str | None,
    Option("--format", help="Of the result: dense, or packed: smaller, read after `import obsprune`. (default: dense)"),
]
PushToHub = Annotated[
    str | None,
    Option(
        metavar="OWNER/NAME", help="Upload the result to the hub; the right to is checked first.", show_default=False
    ),
]
Private = Annotated[bool, Option("--private", help="The repository on the hub is private.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show what would be pruned and skipped, and stop.")]
Force = Annotated[bool, Option("--force", help="Delete a former run in the output directory and start anew.")]
Json = Annotated[bool, Option("--json", help="Only the result, as JSON, on stdout.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress.")]
