"""Where the weights of an iterate and what belongs to them live: on the device when all fits, on disk when it does not.

A Store keeps tensors by block; a Place gives a block its weights for the time of a visit. Results are the same bytes in
both places.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from obsprune.engine.rundir import RunDir
from obsprune.errors import OutputError
from obsprune.models.activations import free_bytes
from obsprune.models.blocks import Block
from obsprune.models.checkpoint import read_headers, read_tensors, write_scratch, write_shard
from obsprune.models.load import Model

Tensors = dict[str, Tensor]
Write = Callable[[Path, Tensors], None]


class Source(ABC):
    """Weights [R, C] by matrix name, and biases and norms by theirs, a block at a time."""

    @abstractmethod
    def get(self, block: Block) -> Tensors:
        """The weights of one block."""


@final
class Dense(Source):
    """The checkpoint's own weights, read again each time: never held beside the sparse ones."""

    def get(self, block: Block) -> Tensors:
        return block.weights()


@final
@dataclass(frozen=True)
class Committed(Source):
    """The weights in the shards of a run."""

    run: RunDir

    def get(self, block: Block) -> dict[str, Tensor]:
        shard = self.run.committed(block.name)
        if shard is None:
            raise OutputError(
                f"the shard of {block.name} in {self.run.path} is gone; repeat the command to make it again"
            )
        return block.weights(shard)


class Store(Source):
    """Tensors by block, to be written and read in any order."""

    @abstractmethod
    def put(self, block: Block, tensors: Tensors) -> None:
        """Keeps these for the block, in place of what was there."""


@final
class InMemory(Store):
    """In the memory of one device; read back to `device`."""

    def __init__(self, memory: torch.device, device: torch.device) -> None:
        self.memory, self.device = memory, device
        self.tensors: dict[str, Tensors] = {}

    def get(self, block: Block) -> Tensors:
        return {name: tensor.to(self.device) for name, tensor in self.tensors[block.name].items()}

    def put(self, block: Block, tensors: Tensors) -> None:
        self.tensors[block.name] = {name: tensor.to(self.memory) for name, tensor in tensors.items()}


@final
class OnDisk(Store):
    """One safetensors file a block; read back to `device`. write: what makes the file (durable, or scratch)."""

    def __init__(self, folder: Path, device: torch.device, write: Write = write_shard) -> None:
        self.folder, self.device, self.write = folder, device, write
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, block: Block) -> Tensors:
        path = self._path(block)
        return {name: tensor.to(self.device) for name, tensor in read_tensors(path, read_headers(path)).items()}

    def put(self, block: Block, tensors: Tensors) -> None:
        self.write(self._path(block), {name: tensor.cpu() for name, tensor in tensors.items()})

    def _path(self, block: Block) -> Path:
        return self.folder / f"{block.name}.safetensors"


class Place(ABC):
    """Holds the blocks of one model, and stores."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @abstractmethod
    def store(self, name: str) -> Store:
        """An empty store; a former one of this name is forgotten."""

    @abstractmethod
    def resident(self, block: Block) -> AbstractContextManager[None]:
        """While open, the block is on the device."""

    @contextmanager
    def at(self, index: int, weights: Source) -> Iterator[Block]:
        """While open, the block of this index is on the device with these weights."""
        block = self.model.blocks[index]
        with self.resident(block):
            block.write(weights.get(block))
            yield block

    def holds(self, needed: Callable[[], int]) -> bool:
        """Whether all blocks can be in use at once, with so many bytes beside them."""
        return False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The time in which the place is used."""
        yield


@final
class OnDevice(Place):
    """All blocks stay on the device, and so do the stores."""

    def store(self, name: str) -> Store:
        return InMemory(self.model.device, self.model.device)

    def resident(self, block: Block) -> AbstractContextManager[None]:
        return nullcontext()

    def holds(self, needed: Callable[[], int]) -> bool:
        return 2 * needed() <= free_bytes(self.model.device)

    @contextmanager
    def opened(self) -> Iterator[None]:
        with self.model.loaded():
            yield


@final
class InHost(Place):
    """One block at a time is on the device; the stores are in host memory."""

    def store(self, name: str) -> Store:
        return InMemory(torch.device("cpu"), self.model.device)

    def resident(self, block: Block) -> AbstractContextManager[None]:
        return block.loaded(self.model.device)


@final
class InFiles(Place):
    """One block at a time is on the device; the stores are files in `folder`, which is deleted at the end."""

    def __init__(self, model: Model, folder: Path) -> None:
        super().__init__(model)
        self.folder = folder

    def store(self, name: str) -> Store:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return OnDisk(self.folder / name, self.model.device, write_scratch)

    def resident(self, block: Block) -> AbstractContextManager[None]:
        return block.loaded(self.model.device)

    @contextmanager
    def opened(self) -> Iterator[None]:
        try:
            yield
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


MEMORIES = ("auto", "device", "host", "disk")


def choose_place(model: Model, memory: str, bytes_a_weight: int, folder: Path) -> Place:
    """`device`, `host`, `disk`, or `auto`: the first of them where half of what is free suffices.

    bytes_a_weight: what the stores hold for each prunable weight at most.
    """
    headers = model.checkpoint.headers
    weights = sum(torch.Size(headers[key].shape).numel() for block in model.blocks for key in block.keys)
    stores = bytes_a_weight * sum(rows * columns for rows, columns in (matrix.shape for matrix in model.matrices))
    if memory == "auto":
        host = 2 * stores <= free_bytes(torch.device("cpu"))
        device = 2 * (stores + weights * model.dtype.itemsize) <= free_bytes(model.device)
        memory = "device" if device else "host" if host else "disk"
    return {"device": OnDevice, "host": InHost}[memory](model) if memory != "disk" else InFiles(model, folder)


def copied(source: Source, place: Place, name: str) -> Store:
    """A new store of the place with the weights of `source`, in float32 on the model's device."""
    store = place.store(name)
    for block in place.model.blocks:
        tensors = source.get(block)
        store.put(block, {key: x.to(place.model.device, torch.float32, copy=True) for key, x in tensors.items()})
    return store
