"""Where the activations of waiting batches live: on the device, in host memory, or in files.

A batch sleeps inside the model's own forward, whose local variables keep its tensors alive. So nothing is copied and
dropped: the tensors stay the same objects, and the memory under them is exchanged (`tensor.data`). Sizes, strides and
who shares memory with whom stay as they are, so whatever is computed is the same to the bit.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import psutil
import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves, tree_map_only

from obsprune.errors import OutputError

LEAST = 2**16
"""Bytes: smaller tensors stay on the device."""
COPIES = 2.5
"""Of what a batch brings to its first block, about as much lives while it waits (its outputs, its embeddings)."""
M_MMAP_THRESHOLD, AT_ONCE = -3, 2**22
"""Of glibc's malloc.h, and the bytes from which on memory is mapped for itself."""
ACTIVATIONS = ("auto", "device", "host", "disk")


class Activations(ABC):
    """A place for tensors that nobody computes with now."""

    @abstractmethod
    def put(self, tensors: Iterable[Tensor]) -> None:
        """Moves them there, in place: every reference to them stays valid. Raises OutputError when it is full."""

    @abstractmethod
    def expect(self, tensors: Iterable[Tensor]) -> None:
        """These will be read next, and may be fetched while the device is at work; what was expected before no longer
        is.
        """

    @abstractmethod
    def read(self, tree: Any) -> Any:
        """The tree with its tensors on the device: copies of those that were moved, the others themselves."""

    @abstractmethod
    @contextmanager
    def awake(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """While open, those of them that were moved are on the device."""


Choose = Callable[[int], Activations]
"""From the bytes that all waiting batches hold at a time to where these live."""


@final
class OnDevice(Activations):
    """They stay where they are."""

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Nothing."""

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Nothing."""

    def read(self, tree: Any) -> Any:
        return tree

    @contextmanager
    def awake(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        yield


class _Elsewhere(Activations):
    """device: where they are computed with; direct: that works with them as they lie there, so that they stay."""

    def __init__(self, device: torch.device, direct: bool) -> None:
        self.device, self.direct = device, direct

    def put(self, tensors: Iterable[Tensor]) -> None:
        _exchange([x for x in tensors if not self._holds(x)], self._stored)

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Nothing: what is not page-locked comes only while the host waits for it."""

    def read(self, tree: Any) -> Any:
        return tree if self.direct else tree_map_only(Tensor, self._copied, tree)

    @contextmanager
    def awake(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        moved = [] if self.direct else [x for x in tensors if self._holds(x)]
        resting = [(x, x.data, x._version) for x in moved]
        _exchange(moved, self._fetched)
        try:
            yield
        finally:
            for x, rest, version in resting:
                if x._version == version:  # else it was changed meanwhile
                    x.data = rest
            self.put(moved)

    def _copied(self, x: Tensor) -> Tensor:
        return _view(self._fetched(x.untyped_storage()), x) if self._holds(x) else x

    def _stored(self, storage: UntypedStorage) -> UntypedStorage:
        return self._room(storage.nbytes()).copy_(storage)

    def _fetched(self, storage: UntypedStorage) -> UntypedStorage:
        there = torch.empty(storage.nbytes(), dtype=torch.uint8, device=self.device).untyped_storage()
        return there.copy_(storage, non_blocking=True)  # the host does not wait; what uses it comes after it

    @abstractmethod
    def _room(self, size: int) -> UntypedStorage:
        """So many bytes there."""

    @abstractmethod
    def _holds(self, x: Tensor) -> bool:
        """Whether a tensor lies there."""


@dataclass(frozen=True)
class Arrival:
    """A copy of some memory on a GPU, complete when the event has happened."""

    there: Tensor
    event: torch.cuda.Event


@final
class InHost(_Elsewhere):
    """In page-locked host memory, for a model on another device.

    coming: what is expected, on its way there, by the address it has here; the host's own memory is kept as long, so
    that no other gets the address.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, direct=False)
        self.coming: dict[int, tuple[UntypedStorage, Arrival]] = {}

    def expect(self, tensors: Iterable[Tensor]) -> None:
        self.coming.clear()
        if self.device.type == "cuda":
            resting = {address(x): x.untyped_storage() for x in tensors if self._holds(x)}
            self.coming = {where: (storage, self._sent(storage)) for where, storage in resting.items()}

    @cached_property
    def _beside(self) -> torch.cuda.Stream:
        """Copies there run in it while the device computes."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def _sent(self, storage: UntypedStorage) -> Arrival:
        """Begins a copy that waits for what is under way now (it may still use the memory), and for nothing later."""
        there = torch.empty(storage.nbytes(), dtype=torch.uint8, device=self.device)
        self._beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._beside):
            there.untyped_storage().copy_(storage, non_blocking=True)
        there.record_stream(self._beside)  # it may be freed unused
        return Arrival(there, self._beside.record_event())

    def _fetched(self, storage: UntypedStorage) -> UntypedStorage:
        if storage.data_ptr() not in self.coming:
            return super()._fetched(storage)
        _, arrival = self.coming.pop(storage.data_ptr())
        torch.cuda.current_stream(self.device).wait_event(arrival.event)
        return arrival.there.untyped_storage()

    def _room(self, size: int) -> UntypedStorage:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).untyped_storage()

    def _holds(self, x: Tensor) -> bool:
        return x.device.type == "cpu"


@final
class InFiles(_Elsewhere):
    """Mapped into memory from files in `folder` that have no name: a kill leaves nothing, and a file ends with its
    tensor.
    """

    def __init__(self, device: torch.device, folder: Path, direct: bool) -> None:
        super().__init__(device, direct)
        self.folder = folder

    def _room(self, size: int) -> UntypedStorage:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as a crash on first use
                name = f"/proc/self/fd/{file.fileno()}"
                return torch.from_file(name, shared=True, size=size, dtype=torch.uint8).untyped_storage()
        except (OSError, RuntimeError) as error:
            raise OutputError(
                f"cannot keep {size / 1e6:.0f} MB of activations in {self.folder}: {error}; make room, use fewer "
                "--nsamples or --activations host, then repeat the command to go on"
            ) from error

    def _holds(self, x: Tensor) -> bool:
        return x.untyped_storage().filename is not None


def chooser(where: str, device: torch.device, folder: Path) -> Choose:
    """`device`, `host`, `disk`, or `auto`: the first of them where half of what is free suffices.

    device: the model's; folder: an existing one, on the disk to use.
    """
    resident, files = OnDevice(), InFiles(device, folder, direct=device.type == "cpu")
    host: Activations = resident if device.type == "cpu" else InHost(device)
    fixed: dict[str, Activations] = {"device": resident, "host": host, "disk": files}

    def choose(needed: int) -> Activations:
        if where in fixed:
            return fixed[where]
        if 2 * needed <= free_bytes(device):
            return resident
        return host if 2 * needed <= free_bytes(torch.device("cpu")) else files

    return choose


def on_device(needed: int) -> Activations:
    """Whatever they need."""
    return OnDevice()


def free_bytes(device: torch.device) -> int:
    """What the device has left; for a CPU what the host has, or the container it is in, shared by all processes of the
    run that torchrun has started there.
    """
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    free = min([psutil.virtual_memory().available, *_container_bytes()])
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _container_bytes(group: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the limit of a container (Linux' cgroup v2) leaves, files that can be dropped counted as free; none where
    there is no limit.
    """
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        lines = (group / "memory.stat").read_text().splitlines()
        dropped = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return [max(0, limit - int((group / "memory.current").read_text()) + dropped)]
    except (OSError, ValueError, StopIteration):
        return []


def trim_heap() -> None:
    """Gives what the process has freed back to the system, and from now on what is large at once: glibc alone would
    keep up to 32 MB of each tensor's size for the next one, which adds up to several blocks.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.mallopt(M_MMAP_THRESHOLD, AT_ONCE)
        libc.malloc_trim(0)


def address(x: Tensor) -> int:
    """Of the memory a tensor lies in; the same for all that share it."""
    return x.untyped_storage().data_ptr()


def movable(tree: Any) -> list[Tensor]:
    """The large plain tensors in a tree: no parameters, nothing that autograd follows."""
    found = [x for x in tree_leaves(tree) if type(x) is Tensor and x.layout == torch.strided]
    return [x for x in found if not x.requires_grad and not x.is_meta and x.untyped_storage().nbytes() >= LEAST]


def _exchange(tensors: Sequence[Tensor], other: Callable[[UntypedStorage], UntypedStorage]) -> None:
    """Puts other memory with the same content under the tensors; those that shared theirs share it again."""
    exchanged: dict[int, UntypedStorage] = {}
    for x in {id(x): x for x in tensors}.values():
        if address(x) not in exchanged:
            exchanged[address(x)] = other(x.untyped_storage())
    for x in {id(x): x for x in tensors}.values():
        x.data = _view(exchanged[address(x)], x)


def _view(storage: UntypedStorage, like: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=like.dtype, device=storage.device)
    return empty.set_(storage, like.storage_offset(), like.size(), like.stride())
