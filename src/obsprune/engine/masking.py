"""The masks of a sparse checkpoint into a file, and from there onto another checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from obsprune.engine.packing import begun, sign
from obsprune.errors import InputError, OutputError
from obsprune.models.checkpoint import copy_side_files, write_index
from obsprune.models.load import Model, locate, open_checkpoint
from obsprune.models.masks import MaskFile, write_masked, write_masks
from obsprune.progress import Progress


def export_masks(
    model: Model, output: Path, pattern: str | None, progress: Progress, force: bool = False
) -> dict[str, Any]:
    """Writes where the prunable matrices of a checkpoint (an outline) are zero. Returns where, and how many zeros.

    Raises InputError when nothing is zero, or `output` is there already (without `force`); OutputError.
    """
    checkpoint, sources = model.checkpoint, model.names.sources
    names = list(dict.fromkeys(key for matrix in model.matrices for key in sources[matrix.parameter]))
    if output.is_dir() or (output.exists() and not force):
        raise InputError(f"{output} is there already; choose another -o{'' if output.is_dir() else ', or use --force'}")
    if not any((checkpoint.read([name])[name] == 0).any() for name in names):
        raise InputError(f"{model.directory} is dense: none of its {len(names)} matrices has a zero")
    progress.stage("masks", len(names))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {output.parent}: {error.strerror}; choose another -o") from error
    zeros = write_masks(output, checkpoint, names, pattern, progress)
    weights = sum(checkpoint.headers[name].bytes // checkpoint.headers[name].dtype.itemsize for name in names)
    return {
        "output": str(output),
        "tensors": len(names),
        "weights": weights,
        "zeros": zeros,
        "pattern": pattern,
        "bytes": output.stat().st_size,
    }


def apply_masks(
    path: Path, model: str, output: Path, progress: Progress, force: bool = False, **asked: str | None
) -> dict[str, Any]:
    """Writes a checkpoint whose weights are `model`'s, and zero where the masks say so. Returns where, and how many
    weights that takes. asked: revision and token, for the hub.

    Raises InputError before anything is written when they do not fit, or `output` holds something; OutputError.
    """
    masks = MaskFile.open(path)
    directory = locate(model, **asked)
    checkpoint = open_checkpoint(directory)
    masks.require_fit(checkpoint)
    with begun([directory, path], output, force):
        progress.stage("masking", len(checkpoint.headers))
        removed = write_masked(checkpoint, masks, output, progress)
        write_index(output)
        copy_side_files(checkpoint.directory, output)
        sign(output, "mask apply")
    return {"output": str(output), "tensors": len(masks.shapes), "removed": removed, "pattern": masks.pattern}
