"""`obsprune mask`: where a sparse checkpoint is zero, to a file and from there to another checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from obsprune.cli import options
from obsprune.cli.console import Watch, guarded, quiet_libraries, tell

app = typer.Typer(help="Masks of a sparse checkpoint: export them, apply them to another one.", no_args_is_help=True)
Sparse = Annotated[
    str, typer.Argument(help="A result of obsprune, or another sparse checkpoint: a directory or a Hugging Face id.")
]
Masks = Annotated[Path, typer.Argument(help="A file that obsprune mask export has written.")]
Other = Annotated[str, typer.Argument(help="A checkpoint of the same architecture: a directory or a Hugging Face id.")]
File = Annotated[Path, typer.Option("--output", "-o", help="The file to write: MASKS.safetensors.", show_default=False)]
Directory = Annotated[Path, typer.Option("--output-dir", "-o", help="Where the result goes.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]


@app.command()
def export(
    source: Sparse,
    output: File,
    force: Overwrite = False,
    revision: options.Revision = None,
    token: options.Token = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write where a checkpoint's pruned matrices are zero, a bit a weight."""
    quiet_libraries()
    with guarded(), Watch(quiet or json_) as watch:
        from obsprune.engine.masking import export_masks
        from obsprune.models.load import locate, outline

        directory = locate(source, revision, token)
        asked = _asked(directory)
        model = outline(
            str(directory), device="cpu", blocks=asked["blocks"], depthwise=True, trust_remote_code=trust_remote_code
        )
        found = export_masks(model, output.expanduser(), asked["pattern"], watch, force)
    share = f"{found['zeros'] / found['weights']:.2%} of {found['weights']:,} weights"
    line = f"{found['zeros']:,} zeros ({share}) in {found['tensors']} tensors"
    tell(found, [] if quiet else [line], json_)


@app.command()
def apply(
    masks: Masks,
    model: Other,
    output_dir: Directory,
    force: options.Force = False,
    revision: options.Revision = None,
    token: options.Token = None,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write another checkpoint of the same architecture with the same weights zero, and all others as they are."""
    quiet_libraries()
    with guarded(), Watch(quiet or json_) as watch:
        from obsprune.engine.masking import apply_masks

        found = apply_masks(
            masks.expanduser(), model, output_dir.expanduser(), watch, force, revision=revision, token=token
        )
    line = f"{found['removed']:,} weights became zero in {found['tensors']} tensors"
    tell(found, [] if quiet else [line], json_)


def _asked(directory: Path) -> dict[str, str | None]:
    """What the recipe of a result says of its blocks and its pattern; of other checkpoints nothing is known."""
    from obsprune.engine.rundir import RECIPE
    from obsprune.models.caution import is_file
    from obsprune.trees import read_recipe

    recipe = read_recipe(directory / RECIPE) if is_file(directory / RECIPE) else {}
    model = recipe.get("model")
    told = {"blocks": model.get("blocks") if isinstance(model, dict) else None, "pattern": recipe.get("pattern")}
    return {key: value if isinstance(value, str) else None for key, value in told.items()}
