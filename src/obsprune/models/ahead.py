"""Weights read ahead: while one block is computed on the device, a thread reads the next one from the disk into
page-locked memory. Costs the host one block more.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, final

from torch import Tensor

if TYPE_CHECKING:
    from obsprune.models.blocks import Block

Stored = dict[str, Tensor]


@final
class ReadAhead:
    """One place for the tensors of the block that comes next; a block that is asked for out of turn is read at once.

    pin: into page-locked memory, from which a GPU takes them without the host waiting.
    """

    def __init__(self, blocks: Sequence[Block], pin: bool) -> None:
        self.blocks, self.pin = blocks, pin
        self.places = {block.name: place for place, block in enumerate(blocks)}
        self.thread = ThreadPoolExecutor(1, "read-ahead")
        self.last = -1
        self.waiting: tuple[int, Future[Stored]] | None = None

    def read(self, block: Block) -> Stored:
        """A block's tensors as stored; the next one's are begun to be read where the blocks come in order. Raises
        InputError when this block's cannot be read.
        """
        place, waiting, self.waiting = self.places[block.name], self.waiting, None
        ahead = waiting[1] if waiting and waiting[0] == place else None
        tensors = ahead.result() if ahead else self._read(block)
        if place == (self.last + 1) % len(self.blocks) and place + 1 < len(self.blocks):
            self.waiting = place + 1, self.thread.submit(self._read, self.blocks[place + 1])
        self.last = place
        return tensors

    def _read(self, block: Block) -> Stored:
        tensors = block.checkpoint.read(block.keys)
        return {key: x.pin_memory() for key, x in tensors.items()} if self.pin else tensors
