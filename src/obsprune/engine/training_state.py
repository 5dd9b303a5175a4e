"""What a training goes on from: weights, and what the optimizer holds of them, in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from obsprune.models.accelerated import Accelerated
from obsprune.models.checkpoint import read_headers, read_tensors, write_shard

WEIGHT = "weight"
"""A parameter in its file, beside what the optimizer holds of it."""
COUNT = "step"
"""Of the steps: torch wants it on the CPU."""


@final
class Saved(Mapping[str, Tensor]):
    """The weights in a folder that `save` has filled, by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def held(self, name: str) -> dict[str, Tensor]:
        """A weight, and what the optimizer holds of it."""
        path = self.folder / f"{name}.safetensors"
        return read_tensors(path, read_headers(path))

    def __getitem__(self, name: str) -> Tensor:
        return self.held(name)[WEIGHT]

    def __contains__(self, name: object) -> bool:
        return (self.folder / f"{name}.safetensors").is_file()

    def __iter__(self) -> Iterator[str]:
        return (path.name.removesuffix(".safetensors") for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def save(folder: Path, trained: Accelerated) -> None:
    """Writes all that a step depends on, a file for each parameter."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, parameter in trained.named.items():
        held = {WEIGHT: parameter.detach(), **trained.optimizer.state[parameter]}
        write_shard(folder / f"{name}.safetensors", {key: x.cpu() for key, x in held.items()})


@torch.no_grad()
def restore(folder: Path, trained: Accelerated) -> None:
    """Puts back what `save` has written."""
    saved = Saved(folder)
    for name, parameter in trained.named.items():
        held = saved.held(name)
        parameter.copy_(held.pop(WEIGHT))
        own = {key: x if key == COUNT else x.to(parameter.device) for key, x in held.items()}
        trained.optimizer.state[parameter] = own
