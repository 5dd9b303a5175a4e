"""Pruning all matrices together by the empirical Fisher of the network (core/fisher.py, core/cbs.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from obsprune.core.fisher import Surgeon
from obsprune.engine.curvature import ASKED, Trainee, gradients
from obsprune.engine.training import Criterion, Masks
from obsprune.errors import InputError
from obsprune.models.activations import free_bytes
from obsprune.models.samples import Batch


@final
@dataclass(frozen=True)
class Surgery(Criterion):
    """Every weight of every matrix in one vector, under one surgeon; the survivors may move."""

    surgeon: Surgeon

    def prune(self, trainee: Trainee, masks: Masks, sparsity: float, batches: Sequence[Batch]) -> Masks:
        return self.operate(trainee, masks, sparsity, sample_gradients(trainee, batches))

    @torch.no_grad()
    def operate(self, trainee: Trainee, masks: Masks, sparsity: float, G_NP: Tensor) -> Masks:
        """The same, given the gradients."""
        weights = {matrix.name: matrix.turn(matrix.weight) for matrix in trainee.matrices}
        before = [masks.get(name, torch.ones_like(W_RC, dtype=torch.bool)) for name, W_RC in weights.items()]
        w_P, before_P = (torch.cat([part.flatten() for part in parts]) for parts in (weights.values(), before))
        sizes = [W_RC.numel() for W_RC in weights.values()]
        w_P, keep_P = self.surgeon.operate(w_P, G_NP, sizes, before_P, round(sparsity * len(w_P)))
        found = {}
        parts = zip(trainee.matrices, torch.split(w_P, sizes), torch.split(keep_P, sizes), strict=True)
        for matrix, w, keep in parts:
            matrix.write(w.view(matrix.shape))
            found[matrix.name] = keep.view(matrix.shape)
        return found


def sample_gradients(trainee: Trainee, batches: Sequence[Batch]) -> Tensor:
    """Of every sample's own loss at all matrices, [N, P] float32. Raises InputError where memory is short."""
    device, samples = trainee.matrices[0].device, sum(len(batch[ASKED]) for batch in batches)
    needed, free = 4 * samples * trainee.size, free_bytes(device)
    if needed > free:
        raise InputError(
            f"the gradients of {samples:,} images at {trainee.size:,} weights take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; lower --nsamples"
        )
    G_NP = torch.empty(samples, trainee.size, device=device)
    singles = ({key: x[i : i + 1] for key, x in batch.items()} for batch in batches for i in range(len(batch[ASKED])))
    for row_P, single in zip(G_NP, singles, strict=True):
        row_P.copy_(torch.cat([gradient.flatten() for gradient in gradients(trainee, single).values()]))
    return G_NP
