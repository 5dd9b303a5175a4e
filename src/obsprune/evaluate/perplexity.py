"""Token perplexity: mean next-token loss inside non-overlapping rows, exponentiated; its protocol goes with it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from obsprune.errors import ObspruneError
from obsprune.models.data import batches
from obsprune.models.load import Model
from obsprune.models.walk import Walk
from obsprune.progress import Progress

LOGIT_BYTES = 2**29
"""Float32 logits of one batch stay under this."""


def perplexity(model: Model, rows: Tensor, progress: Progress, title: str = "evaluating") -> dict[str, Any]:
    """Perplexity of token rows [n, seqlen]; the model is streamed block by block, and may exceed the memory.

    Returns perplexity, nll (nats a token), number of predicted tokens. Raises ObspruneError when the loss is NaN.
    """
    seqlen = rows.shape[1]
    size = max(1, min(64, LOGIT_BYTES // (4 * seqlen * model.vocabulary)))
    parts = batches(rows, size, model.device)
    sums: list[Tensor] = []
    progress.stage(title, len(model.blocks))

    def finish(key: int, output: Any) -> None:
        sums.append(next_token_loss(output.logits, parts[key]["input_ids"]))

    with torch.no_grad(), Walk(model.network, [block.module for block in model.blocks], parts, finish) as walk:
        for stop in walk:
            with model.blocks[stop.index].loaded(model.device):
                stop.hand_on()
            progress.step()
    tokens = rows.shape[0] * (seqlen - 1)
    nll = float(torch.stack(sums).sum()) / tokens
    if math.isnan(nll):
        raise ObspruneError("the model's logits are not finite; evaluate in a wider type (--dtype float32)")
    return {"perplexity": math.exp(min(nll, 700.0)), "nll": nll, "predicted_tokens": tokens}


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum of the next-token cross-entropies of a batch, in nats; float32, summed row by row in float64."""
    losses = [
        functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum").double()
        for row, target in zip(logits, ids, strict=True)
    ]
    return torch.stack(losses).sum()
