"""A model in memory: written as a checkpoint, and given the weights of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from obsprune.errors import InputError, first_line
from obsprune.models.load import open_checkpoint
from obsprune.models.names import names_of
from obsprune.models.ready import without_bars


def write_whole(model: Any, processor: Any, directory: Path) -> None:
    """Writes a transformers model and its tokenizer or image processor. Raises InputError for anything else."""
    if not hasattr(model, "save_pretrained"):
        raise InputError(
            f"the model is a {type(model).__name__}; a directory, a Hugging Face id, or a transformers model is "
            "expected (docs/retraining.md: any other torch module)"
        )
    if not hasattr(processor, "save_pretrained"):
        raise InputError(
            f"the processor of a model in memory is {processor!r}; its tokenizer or image processor is wanted"
        )
    _require_writable(model)
    try:
        with without_bars():
            model.save_pretrained(directory)
            processor.save_pretrained(directory)
    except Exception as error:  # transformers refuses in many ways what it cannot save
        raise InputError(f"the model cannot be saved, and so not be pruned in memory: {first_line(error)}") from error
    own = model.state_dict()
    for name in names_of(model, open_checkpoint(directory).headers).sources:
        if name not in own:
            raise InputError(
                f"{name} is saved and is no weight of this {type(model).__name__}; give the model inside it"
            )


def _require_writable(model: Any) -> None:
    """Raises InputError where a weight's place in memory does not hold its number."""
    elsewhere = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if elsewhere:
        raise InputError(
            f"{elsewhere[0]} and {len(elsewhere) - 1} others of the model are not in memory; load it without "
            "device_map and offloading, or give its directory"
        )


@torch.no_grad()
def fill(model: Any, directory: Path) -> None:
    """Gives a model the weights of a checkpoint of its own architecture, in place, in its own dtype."""
    checkpoint, own = open_checkpoint(directory), model.state_dict()
    for part in names_of(model, checkpoint.headers).parts:
        for name, tensor in part.join(checkpoint.read(part.keys)).items():
            own[name].copy_(tensor)
