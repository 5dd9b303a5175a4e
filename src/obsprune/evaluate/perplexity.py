"""Token perplexity: mean next-token loss inside non-overlapping rows, exponentiated; its protocol goes with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from obsprune.core.losses import perplexity
from obsprune.errors import ObspruneError
from obsprune.evaluate.task import Scored, Task
from obsprune.models.load import Model
from obsprune.models.samples import Samples
from obsprune.progress import Progress

LOGIT_BYTES = 2**29
"""Float32 logits of one batch stay under this."""


@final
@dataclass(frozen=True)
class Perplexity(Task):
    """Of rows of token ids; items: each row's mean loss."""

    name: str
    samples: Samples
    protocol: dict[str, Any]
    metric = "perplexity"

    def score(self, model: Model, progress: Progress, who: str) -> Scored:
        """perplexity, nll (nats a token), number of predicted tokens. Raises ObspruneError when the loss is NaN."""
        rows_N = row_losses(model, self.samples, progress, f"{self.name}, {who}")
        predicted = self.samples.positions - 1
        nll = float(rows_N.sum()) / (len(rows_N) * predicted)
        if math.isnan(nll):
            raise ObspruneError("the model's logits are not finite; evaluate in a wider type (--dtype float32)")
        values = {"perplexity": perplexity(nll), "nll": nll, "predicted_tokens": len(rows_N) * predicted}
        return Scored({"metric": self.metric, **values, **self.protocol}, {"nll": (rows_N / predicted).tolist()})


def rows_at_once(samples: Samples, model: Model) -> int:
    """Rows of one forward, in each process: at most 64, and so few that their logits stay under LOGIT_BYTES."""
    return max(1, min(64, LOGIT_BYTES // (4 * samples.positions * model.classes)))


def row_losses(model: Model, samples: Samples, progress: Progress, title: str) -> Tensor:
    """Next-token losses of each row, summed over the row, float64 [N]. The model is streamed block by block, and may
    exceed the memory.
    """
    ranks = model.ranks
    parts = model.shared(samples, ranks.size * rows_at_once(samples, model))
    losses: dict[int, Tensor] = {}
    progress.stage(title, len(model.blocks))

    def finish(key: int, output: Any) -> None:
        losses[key] = next_token_losses(output.logits, parts[key]["input_ids"]).cpu()

    with torch.no_grad(), model.walk(parts, finish) as walk:
        for stop in walk:
            with model.blocks[stop.index].loaded(model.device):
                stop.hand_on()
            progress.step()
    rows_N = torch.zeros(len(samples), dtype=torch.float64)
    rows_N[list(ranks.mine(len(samples)))] = torch.cat([losses[key] for key in range(len(parts))])
    ranks.sum([rows_N])
    return rows_N


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum of the next-token cross-entropies of each row of a batch, in nats; in float32, given as float64."""
    return torch.stack(
        [
            functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum").double()
            for row, target in zip(logits, ids, strict=True)
        ]
    )
