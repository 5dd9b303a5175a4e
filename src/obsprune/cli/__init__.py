"""The command line: a thin skin. No torch at import; one file a command."""

from __future__ import annotations

from collections.abc import Callable

import typer

from obsprune.cli.bench import bench
from obsprune.cli.bench_inference import bench_inference
from obsprune.cli.console import guarded
from obsprune.cli.evaluate import evaluate
from obsprune.cli.finetune import finetune
from obsprune.cli.inspect import inspect
from obsprune.cli.mask import app as mask
from obsprune.cli.pack import pack, unpack
from obsprune.cli.prune import prune
from obsprune.cli.push import push
from obsprune.cli.recipe import app as recipe
from obsprune.cli.report import report
from obsprune.cli.train_prune import train_prune

SETTINGS = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda word: word.replace("_", "-")}
app = typer.Typer(
    help="Make pretrained Hugging Face checkpoints sparse, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "prune": prune,
    "train-prune": train_prune,
    "finetune": finetune,
    "eval": evaluate,
    "inspect": inspect,
    "report": report,
    "pack": pack,
    "unpack": unpack,
    "push": push,
    "bench": bench,
    "bench-inference": bench_inference,
}
for name, command in COMMANDS.items():
    app.command(name, context_settings=SETTINGS)(guarded()(command))
app.add_typer(mask, name="mask")
app.add_typer(recipe, name="recipe")


def _version(show: bool) -> None:
    if show:
        from obsprune import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Make pretrained Hugging Face checkpoints sparse, and measure what it cost."""


def main() -> None:
    """The entry point."""
    app()
