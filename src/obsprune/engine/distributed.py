"""Several processes by torch.distributed, as torchrun (or accelerate launch) starts them: NCCL between GPUs, gloo
between CPUs.

    torchrun --nproc_per_node 4 -m obsprune prune MODEL …
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor

from obsprune.errors import InputError, ObspruneError, first_line
from obsprune.ranks import ALONE, Ranks

T = TypeVar("T")
CONNECTION = ("connection", "gloo", "socket", "timed out")
"""Words in what gloo says of a process that is gone."""
PATIENCE = timedelta(days=1)
"""How long a process waits for the others: the solution of one layer, or their evaluation, may take long."""


@contextmanager
def processes() -> Iterator[Ranks]:
    """The processes this one was started with. Raises InputError when a launcher was asked for several and has started
    one, as `accelerate launch` does on a CPU.
    """
    if "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        raise InputError(
            "accelerate launch was asked for several processes and has started one, as it does on a CPU; "
            "use torchrun --nproc_per_node N -m obsprune …"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    missing = {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(sorted(missing))} not set: start with torchrun, "
            "or unset WORLD_SIZE for one process"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    with _explained():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Group(local)
    finally:
        dist.destroy_process_group()


def alone(what: str) -> None:
    """Raises InputError when this is one of several processes: what they are to do is for one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise InputError(f"{what} works in one process, and {size} were started; prune and eval can share their work")


@final
class Group(Ranks):
    """One process of the group; local: its number on its machine."""

    def __init__(self, local: int) -> None:
        self.local = local
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def device(self, asked: str) -> str:
        if asked.startswith("cuda:"):
            raise InputError(f"{self.size} processes cannot share {asked}; use --device cuda, one GPU for each")
        several = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
        if several and self.local >= torch.cuda.device_count():
            raise InputError(
                f"process {self.local} on this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs, or use --device cpu"
            )
        return f"cuda:{self.local}" if several else asked

    def sum(self, tensors: Sequence[Tensor], owners: Collection[int] = ()) -> None:
        with _explained():
            for tensor in tensors:
                whole = tensor.contiguous()
                if len(owners) == 1:
                    dist.reduce(whole, next(iter(owners)))
                else:
                    dist.all_reduce(whole)
                if whole is not tensor:
                    tensor.copy_(whole)

    def give(self, tensor: Tensor, source: int = 0) -> None:
        bits = tensor.contiguous()
        with _explained():
            dist.broadcast(bits.view(-1).view(torch.uint8), source)  # as it lies: not every backend knows every dtype
        if bits is not tensor:
            tensor.copy_(bits)

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(found, value)
        return found

    def told(self, find: Callable[[], T]) -> T:
        held: list[Any] = [_attempt(find) if self.first else None]
        with _explained():
            dist.broadcast_object_list(held)
        found: T | ObspruneError = held[0]
        return _outcome(held, found)

    def agree(self, work: Callable[[], T]) -> T:
        mine = _attempt(work)
        errors = self.gather(mine if isinstance(mine, ObspruneError) else None)
        return _outcome(errors, mine)


def _attempt(work: Callable[[], T]) -> T | ObspruneError:
    try:
        return work()
    except ObspruneError as error:
        return error


def _outcome(found: Sequence[Any], value: T | ObspruneError) -> T:
    """The value, unless somebody has found an error: all raise the first one, and one of them tells it."""
    error = next((one for one in found if isinstance(one, ObspruneError)), None)
    if error is not None:
        error.shared = True
        raise error
    assert not isinstance(value, ObspruneError)
    return value


@contextmanager
def _explained() -> Iterator[None]:
    """A connection that breaks means that another process has ended, whatever the backend calls it."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in CONNECTION):
            raise
        raise ObspruneError(
            "another process of this run has ended, or cannot be reached; all must go on together. What was committed "
            f"stays: repeat the same command, with as many processes as you like ({first_line(error)})"
        ) from error
