"""A model in memory: written as a checkpoint, and given the weights of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from obsprune.errors import InputError
from obsprune.models.load import open_checkpoint
from obsprune.models.names import names_of


def write_whole(model: Any, processor: Any, directory: Path) -> None:
    """Writes a transformers model and its tokenizer or image processor. Raises InputError for anything else."""
    for thing, what in ((model, "model"), (processor, "processor")):
        if not hasattr(thing, "save_pretrained"):
            raise InputError(
                f"the {what} is a {type(thing).__name__}; a directory, a Hugging Face id, or a transformers model with "
                "processor=its tokenizer or image processor is expected (docs/retraining.md: any other torch module)"
            )
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


@torch.no_grad()
def fill(model: Any, directory: Path) -> None:
    """Gives a model the weights of a checkpoint of its own architecture, in place, in its own dtype."""
    checkpoint, own = open_checkpoint(directory), model.state_dict()
    for part in names_of(model, checkpoint.headers).parts:
        for name, tensor in part.join(checkpoint.read(part.keys)).items():
            if name in own:
                own[name].copy_(tensor)
