"""Sparse weights in a loaded MobileNetV1, with the statistics of its batch norms as they were or with new ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from obsprune.engine.curvature import Trainee
from obsprune.engine.norms import Renorm
from obsprune.models.load import Model
from obsprune.models.samples import Batch
from obsprune.studies.mobilenet import write


@contextmanager
def pruned(model: Model, trainee: Trainee, w_P: Tensor, batches: Sequence[Batch]) -> Iterator[None]:
    """While open, the loaded blocks have these weights, and where batches are given the norms new statistics."""
    before = {name: x.clone() for name, x in trainee.network.state_dict().items()}
    try:
        if batches:
            renew(model, w_P, batches)
        write(trainee, w_P)
        yield
    finally:
        trainee.network.load_state_dict(before)


def renew(model: Model, w_P: Tensor, batches: Sequence[Batch]) -> None:
    """Prunes the loaded dense blocks one after the other; what leaves the norms of each keeps the mean and variance it
    had before, as with `engine.reestimate_norms`. w_P: the weights of all matrices.
    """
    sizes = [rows * columns for rows, columns in (matrix.shape for matrix in model.matrices)]
    parts = dict(zip([matrix.name for matrix in model.matrices], torch.split(w_P, sizes), strict=True))
    with model.walk([{"pixel_values": batch["pixel_values"]} for batch in batches]) as walk:
        for stop in walk:
            norms = Renorm.of(stop, stop.keys, model.ranks)
            for matrix in model.blocks[stop.index].matrices:
                matrix.write(parts[matrix.name].view(matrix.shape))
            norms.apply(stop)
            if stop.last:
                break
            stop.hand_on()
