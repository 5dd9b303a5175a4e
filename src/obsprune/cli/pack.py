"""`obsprune pack` and `obsprune unpack`: a checkpoint in less room, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from obsprune.cli import options
from obsprune.cli.console import Watch, quiet_libraries, tell

Output = Annotated[Path, typer.Option("--output-dir", "-o", help="Where the result goes.", show_default=False)]
Dense = Annotated[
    str, typer.Argument(help="A result of obsprune, or another safetensors checkpoint: a directory or Hugging Face id.")
]
Packed = Annotated[str, typer.Argument(help="What obsprune pack has written: a directory or a Hugging Face id.")]


def pack(
    source: Dense,
    output_dir: Output,
    force: options.Force = False,
    revision: options.Revision = None,
    token: options.Token = None,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a sparse checkpoint in less room, without loss; from_pretrained reads it after `import obsprune`."""
    quiet_libraries()
    from obsprune.engine import packing
    from obsprune.models.load import locate

    _carry_out(packing.pack, locate(source, revision, token), output_dir, force, json_, quiet)


def unpack(
    source: Packed,
    output_dir: Output,
    force: options.Force = False,
    revision: options.Revision = None,
    token: options.Token = None,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the checkpoint that a packed one was made of, byte by byte, for everything that reads safetensors."""
    quiet_libraries()
    from obsprune.engine import packing
    from obsprune.models.load import locate

    _carry_out(packing.unpack, locate(source, revision, token), output_dir, force, json_, quiet)


def _carry_out(
    work: Callable[..., dict[str, Any]], source: Path, output: Path, force: bool, as_json: bool, quiet: bool
) -> None:
    with Watch(quiet or as_json) as watch:
        found = work(source, output.expanduser(), watch, force)
    sizes = f"{found['dense_bytes'] / 1e6:.1f} MB dense, {found['packed_bytes'] / 1e6:.1f} MB packed"
    line = f"{sizes} ({found['share']:.1%}), {found['tensors']} tensors, {found['seconds']:.1f} s"
    tell(found, [] if quiet else [line], as_json)
