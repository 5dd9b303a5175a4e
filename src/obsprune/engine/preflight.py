"""What is checked before an hour is spent: the walk equals the model's own forward, and all numbers are finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from obsprune.errors import InputError, WalkMismatch
from obsprune.models.backward import Visit, backward_of, reverse_walk
from obsprune.models.load import Model, suitable
from obsprune.models.matrices import Matrix, differentiated, observed, take_gradients
from obsprune.progress import Progress


def check_walk(model: Model, batch: Mapping[str, Tensor], progress: Progress) -> dict[str, int]:
    """Sends one small batch through the dense model twice, plainly and by the walk; both must agree bit for bit.

    Every block is loaded on the way, so a weight that is missing or not finite shows here, before anything is written.
    Returns how many tokens of the batch enter each matrix, by its name.
    Raises WalkMismatch, or InputError naming the weight or the matrix with infinite inputs.
    """
    progress.stage("checking the model", len(model.blocks))
    entered: dict[str, int] = {}

    def see(matrix: Matrix, x: Tensor) -> None:
        _require_finite(matrix, x)
        entered[matrix.name] = entered.get(matrix.name, 0) + sum(len(part) for part in matrix.tokens(x))

    with observed(model.matrices, see), model.lazily_loaded(), torch.no_grad(), suitable(model):
        plain = model.network(**batch).logits
    walked: list[Any] = []
    with model.walk([batch], lambda _, out: walked.append(out.logits)) as walk:
        for stop in walk:
            with model.blocks[stop.index].loaded(model.device):
                stop.hand_on()
            progress.step()
    if not torch.equal(walked[0], plain):
        difference = float((walked[0] - plain).abs().max())
        raise WalkMismatch(
            f"walking a {model.config.model_type} model changes its logits by {difference:g}; please report it"
        )
    return entered


def _require_finite(matrix: Matrix, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise InputError(
            f"the dense model's activations into {matrix.name} are not finite in {x.dtype}; "
            "compute in a wider type (--dtype float32), or the checkpoint is damaged"
        )


def check_gradients(model: Model, batch: Mapping[str, Tensor]) -> None:
    """Sends one small batch through the dense model and back, as rounds will. Raises WalkMismatch, InputError."""

    @contextmanager
    def backward_at(index: int) -> Iterator[Visit]:
        block = model.blocks[index]
        with block.loaded(model.device), differentiated([matrix.tensor for matrix in block.matrices]):
            yield lambda run: run()
            for _ in take_gradients(block.matrices):
                pass

    finish = backward_of(lambda _, output: output.logits.float().square().mean())
    walk = model.walk([batch], finish, record=True)
    reverse_walk(walk, lambda index: model.blocks[index].loaded(model.device), backward_at)
