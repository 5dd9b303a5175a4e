"""The walk: many batches go through an untouched model together and meet at every block.

Each batch runs the model's own forward in a greenlet. A block's forward is replaced by "hand my arguments to the engine
and sleep until it returns my output", so masks, rotary embeddings and everything else a family does between its blocks
pass as they are, without one line per family. `Stop` is the meeting at one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from types import TracebackType
from typing import Any, final
from weakref import ReferenceType, ref

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from obsprune.errors import WalkMismatch
from obsprune.models.activations import COPIES, Activations, Choose, OnDevice, address, movable, on_device, trim_heap

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
FLOOR_LEVELS = 20
"""C frames under a driver: torch walks up to 65 frames on an error, and must not leave the greenlet's own stack."""


class _Step:
    """A call through a type slot: unlike a plain Python call (inlined since 3.11) it leaves frames on the C stack."""

    def __init__(self, then: Callable[[], Any]) -> None:
        self.then = then

    def __call__(self) -> Any:
        return self.then()


def _floor(function: Callable[[], Any]) -> Callable[[], Any]:
    for _ in range(FLOOR_LEVELS):
        function = _Step(function)
    return function


@contextmanager
def _grad_mode(record: bool) -> Iterator[None]:
    """Grad mode belongs to the thread, not to the greenlet: put back whatever the model's own code does to it."""
    was = torch.is_grad_enabled()
    try:
        with torch.set_grad_enabled(record):
            yield
    finally:
        torch.set_grad_enabled(was)


@final
class _Driver(greenlet):  # type: ignore[misc]  # greenlet ships no types
    """One batch on its way through the model. Only drivers sleep at a block: the engine may run blocks itself."""

    def __init__(self, network: nn.Module, batch: Mapping[str, Tensor], record: bool) -> None:
        super().__init__(_floor(lambda: network(**batch)))
        self.record = record

    def resume(self, *value: Any) -> Any:
        """Goes on to the next block (returns its Call) or to the end (returns the model's output)."""
        with _grad_mode(self.record):
            return self.switch(*value)

    def end(self) -> None:
        """Wakes a sleeper for the last time: the model's own cleanup runs, and nothing else."""
        if self and not self.dead:
            with _grad_mode(False):
                self.throw(GreenletExit)


def _meeting(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def sleep(*args: Any, **kwargs: Any) -> Any:
        me = getcurrent()
        if not isinstance(me, _Driver):
            return forward(*args, **kwargs)
        assert me.parent is not None
        return me.parent.switch((block, args, kwargs))

    return sleep


@final
class Stop:
    """All batches stand before one block. `run` it on any of them, as often as needed; then `leave` with its output.

    index: the block's place in the list of blocks; last: no block is still to come.
    """

    def __init__(self, walk: Walk, index: int, last: bool) -> None:
        self._walk, self.index, self.last = walk, index, last

    @property
    def keys(self) -> list[int]:
        """The batches that still wait here."""
        return sorted(self._walk.calls)

    @property
    def module(self) -> nn.Module:
        """The block itself."""
        return self._walk.blocks[self.index]

    def run(self, key: int, record: bool = False, then: int | None = None) -> Any:
        """The block's output (whatever the block returns) for one batch, with its weights as they are now; `record`:
        with its graph; `then`: the batch to be run next, whose arguments come to the device meanwhile.
        """
        args, kwargs = self.call(key)
        self._walk.expect(then)
        with torch.set_grad_enabled(record):
            return self._walk.forwards[self.module](*args, **kwargs)

    def call(self, key: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments (args, kwargs) one batch brings to the block, on the device."""
        args, kwargs = self._walk.activations.read(self._walk.calls[key][1:])
        return args, kwargs

    def keep(self, output: Any) -> None:
        """For an output that somebody holds on to: it goes, in place, to where the waiting activations live."""
        self._walk.put(output)

    def leave(self, key: int, output: Any) -> None:
        """Sends one batch on with `output`; its arguments are forgotten first: one copy of activations suffices."""
        del self._walk.calls[key]
        self._walk.resume(key, output)

    def hand_on(self, keys: Iterable[int] | None = None) -> None:
        """Runs the block once more on every batch (or on these) and sends them on, one at a time."""
        for key, then in in_turn(self.keys if keys is None else keys):
            self.leave(key, self.run(key, then=then))


def in_turn(keys: Iterable[int]) -> Iterator[tuple[int, int | None]]:
    """Each key with the one that comes after it."""
    keys = list(keys)
    return zip_longest(keys, keys[1:])


@final
class Walk:
    """A context manager and an iterator of Stops.

    network: the model; blocks: the modules to stop at, in the order of the forward; batches: keyword arguments of the
    model; finish(key, output): called with the model's own output when a batch has gone all the way; record: what the
    model does between its blocks is recorded for autograd (the blocks themselves never are: `Stop.run`); choose: where
    the activations of waiting batches live, asked when the first batch has come to its first block.
    Raises WalkMismatch when batches take different ways or a block comes twice.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Sequence[Mapping[str, Tensor]],
        finish: Callable[[int, Any], None] = lambda key, output: None,
        record: bool = False,
        choose: Choose = on_device,
    ) -> None:
        self.network, self.blocks, self.finish = network, list(blocks), finish
        self.drivers = {key: _Driver(network, batch, record) for key, batch in enumerate(batches)}
        self.running: int | None = None
        self.calls: dict[int, Call] = {}
        self.forwards: dict[nn.Module, Callable[..., Any]] = {}
        self.choose = choose
        self.activations: Activations = OnDevice()
        self.held: dict[int, list[ReferenceType[Tensor]]] = {key: [] for key in self.drivers}
        self.hooks: list[RemovableHandle] = []
        own = [*network.parameters(), *network.buffers(), *(x for batch in batches for x in batch.values())]
        self.spared = {address(x) for x in own if isinstance(x, Tensor)}

    def __enter__(self) -> Walk:
        inside = {module for block in self.blocks for module in block.modules()}
        for module in self.network.modules():
            if module not in inside:
                self.hooks.append(module.register_forward_hook(self._note))
        for block in self.blocks:
            self.forwards[block] = block.forward
            block.forward = _meeting(block, block.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()
        for block in self.forwards:
            del block.forward
        self.calls.clear()
        self.expect(None)
        with ExitStack() as ending:  # all of them, even if the cleanup of one raises
            for driver in self.drivers.values():
                ending.callback(driver.end)

    def __iter__(self) -> Iterator[Stop]:
        for key in self.drivers:
            self.resume(key)
            if key == 0:
                self._settle()
        visited: set[nn.Module] = set()
        while self.calls:
            block = self._meeting_place()
            if block in visited:
                raise WalkMismatch(
                    f"{self._name(block)} is run twice in one forward (shared layers); this is unsupported"
                )
            visited.add(block)
            trim_heap()
            yield Stop(self, self.blocks.index(block), last=len(visited) == len(self.blocks))
        for block in self.blocks:
            if block not in visited:
                raise WalkMismatch(f"{self._name(block)} is never run by the model's forward")

    def current(self) -> int:
        """The key of the batch that runs between two blocks now."""
        assert self.running is not None
        return self.running

    def resume(self, key: int, *value: Any) -> None:
        """Lets one batch run to the next block or to the end, and notes that; `running` is its key meanwhile."""
        self.running = key
        with self.activations.awake(self._holding(key)):
            at = self.drivers[key].resume(*value)
            self.running = None
            if self.drivers[key].dead:
                self.finish(key, at)
                return
        self.calls[key] = at
        self.held[key] = [ref(x) for x in {*self._holding(key), *movable(at)}]
        self.put(self._holding(key))

    def expect(self, key: int | None) -> None:
        """This batch is the next to run, or nobody knows which one."""
        self.activations.expect(movable(self.calls.get(key)) if key is not None else ())

    def put(self, tree: Any) -> None:
        """Lets the large tensors of a tree lie where the waiting activations live."""
        self.activations.put(x for x in movable(tree) if address(x) not in self.spared)

    def _settle(self) -> None:
        """Chooses where activations live, by what the first batch has brought to its first block."""
        large = {address(x): x.untyped_storage().nbytes() for x in movable(self.calls.get(0))}
        self.activations = self.choose(int(COPIES * sum(large.values()) * len(self.drivers)))
        self.put(self._holding(0))

    def _holding(self, key: int) -> list[Tensor]:
        """The large tensors that one batch keeps alive while it sleeps."""
        return [x for held in self.held[key] if (x := held()) is not None]

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model's forward may hold on to what a module outside the blocks gave: an embedding."""
        if self.running is not None:
            self.held[self.running] += map(ref, movable(output))

    def _meeting_place(self) -> nn.Module:
        places = {call[0] for call in self.calls.values()}
        if len(places) != 1 or len(self.calls) != len(self.drivers):
            names = ", ".join(sorted(self._name(place) for place in places))
            raise WalkMismatch(f"batches take different ways through the model (now at {names}); this is unsupported")
        return places.pop()

    def _name(self, block: nn.Module) -> str:
        return next(str(name) for name, module in self.network.named_modules() if module is block)
