"""`obsprune inspect`: what became of every matrix, from the report and the files' headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from obsprune.cli import options
from obsprune.cli.console import quiet_libraries
from obsprune.cli.tables import inspect_table


def inspect(
    directory: Annotated[Path, typer.Argument(help="A result of obsprune prune.")],
    json_: options.Json = False,
) -> None:
    """Show sparsity, error, time and damping of every matrix."""
    quiet_libraries()
    from obsprune.pipeline import inspect_result

    result = inspect_result(directory)
    typer.echo(json.dumps(result, indent=1) if json_ else inspect_table(result))
