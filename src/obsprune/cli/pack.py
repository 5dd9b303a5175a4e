"""`obsprune pack` and `obsprune unpack`: a checkpoint in less room, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from obsprune.cli import options
from obsprune.cli.console import Watch, err, quiet_libraries

Output = Annotated[Path, typer.Option("--output-dir", "-o", help="Where the result goes.", show_default=False)]
Dense = Annotated[Path, typer.Argument(help="A directory: a result of obsprune, or another safetensors checkpoint.")]
Packed = Annotated[Path, typer.Argument(help="A directory that obsprune pack has written.")]


def pack(
    source: Dense,
    output_dir: Output,
    force: options.Force = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a sparse checkpoint in less room, without loss; from_pretrained reads it after `import obsprune`."""
    quiet_libraries()
    from obsprune.engine import packing

    _show(packing.pack, source, output_dir, force, json_, quiet)


def unpack(
    source: Packed,
    output_dir: Output,
    force: options.Force = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the checkpoint that a packed one was made of, byte by byte, for everything that reads safetensors."""
    quiet_libraries()
    from obsprune.engine import packing

    _show(packing.unpack, source, output_dir, force, json_, quiet)


def _show(
    work: Callable[..., dict[str, Any]], source: Path, output: Path, force: bool, as_json: bool, quiet: bool
) -> None:
    with Watch(quiet or as_json) as watch:
        found = work(source.expanduser(), output.expanduser(), watch, force)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    if not quiet:
        sizes = f"{found['dense_bytes'] / 1e6:.1f} MB dense, {found['packed_bytes'] / 1e6:.1f} MB packed"
        err.print(f"{sizes} ({found['share']:.1%}), {found['tensors']} tensors, {found['seconds']:.1f} s")
    typer.echo(found["output"])
