"""transformers' Trainer, and those made of it (TRL's), on a sparse model.

Trainer(model, arguments, train_dataset=rows, callbacks=[obsprune.SparsityCallback()]).train()
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, final

from transformers import TrainerCallback

from obsprune.models.sparse_training import Zeros, keep_sparse


@final
class SparsityCallback(TrainerCallback):
    """Weights that are zero when training begins (or goes on from a checkpoint) are exactly zero after every step, in
    every checkpoint, and at the end (models/sparse_training.py).

    skip: regular expressions of the names of parameters that may become dense. Training raises InputError when nothing
    is zero.
    """

    def __init__(self, skip: Collection[str] = ()) -> None:
        self._skip, self._open = tuple(skip), ExitStack()
        self._zeros: Zeros | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        self._open.close()  # of a training that an error has ended
        self._zeros = self._open.enter_context(keep_sparse(told["model"], self._skip))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._zeros:  # once more: optimizers that are none of torch's call no hooks
            self._zeros.restore()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._zeros = None
        self._open.close()
