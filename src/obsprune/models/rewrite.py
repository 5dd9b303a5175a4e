"""A checkpoint once more, with other weights: the same files, names, shapes and dtypes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from obsprune.errors import InputError
from obsprune.models.blocks import merged
from obsprune.models.checkpoint import INDEX, write_atomic, write_shard
from obsprune.models.load import Model
from obsprune.models.packed_layout import PACKED
from obsprune.progress import Progress

SUFFIX = ".safetensors"


def files_of(model: Model) -> dict[str, list[str]]:
    """{file: the keys in it}. Raises InputError for files that are not written here."""
    if PACKED.found(model.directory):
        raise InputError(f"{model.directory} is packed; obsprune unpack {model.directory} -o DIRECTORY first")
    files: dict[str, list[str]] = {}
    for key, header in model.checkpoint.headers.items():
        files.setdefault(header.file, []).append(key)
    if others := [file for file in files if not file.endswith(SUFFIX)]:
        raise InputError(
            f"{model.directory} holds its weights in {others[0]}; save it with save_pretrained, as safetensors"
        )
    return files


def rewrite(model: Model, state: Mapping[str, Tensor], directory: Path, progress: Progress) -> None:
    """Writes all files of weights, one in memory at a time: what differs from the checkpoint in `state` ({parameter's
    name: tensor}) from there, the rest bit for bit as stored. Raises InputError, OutputError.
    """
    files = files_of(model)
    progress.stage("writing", len(files))
    for file, keys in files.items():
        told = _metadata(model.checkpoint.directory / file)
        write_shard(directory / file, _renewed(model, state, keys), told)
        progress.step()
    index = model.checkpoint.directory / INDEX
    if index.is_file():
        write_atomic(directory / INDEX, partial(shutil.copyfile, index))


def _metadata(path: Path) -> dict[str, str]:
    """What a file says of itself, such as how it was pruned."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _renewed(model: Model, state: Mapping[str, Tensor], keys: Sequence[str]) -> dict[str, Tensor]:
    """The tensors under these keys as they are to be stored."""
    names = model.names.stored_as(keys)
    tensors = model.checkpoint.read({*names.keys, *keys})
    for part in names.parts:
        stored = part.join({key: tensors[key] for key in part.keys})
        now = {name: merged(x, state[name].detach().cpu()) if name in state else x for name, x in stored.items()}
        if any(now[name] is not x for name, x in stored.items()):
            tensors |= part.split(now)
    return {key: tensors[key] for key in keys}
