"""`obsprune recipe`: the presets, to read and to copy."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Presets: list them, show one.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Name every preset, with what it does."""
    from obsprune.presets import names, path_of

    for name in names():
        first = path_of(name).read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{name:10} {first.removeprefix('# ')}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A preset.")]) -> None:
    """Print a preset as the YAML that --config takes."""
    from obsprune.cli.console import guarded
    from obsprune.presets import path_of

    with guarded():
        typer.echo(path_of(name).read_text(encoding="utf-8"), nl=False)
