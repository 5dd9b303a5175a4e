"""How many calibration tokens reach each expert of a mixture, and what becomes of those that too few reach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from obsprune.core.statistics import Gram
from obsprune.engine.inputs import Enough, Quota
from obsprune.models.blocks import Block
from obsprune.models.experts import Experts
from obsprune.models.matrices import Matrix
from obsprune.models.walk import Stop
from obsprune.ranks import Ranks
from obsprune.solvers.base import AnySolver
from obsprune.solvers.magnitude import Magnitude
from obsprune.solvers.wanda import Wanda

Facts = dict[str, Any]


class Starved(ABC):
    """What becomes of an expert that too few tokens reach. everywhere: it is measured on all tokens of its layer; fate:
    in words; prunes: whether it loses weights; helps: even where no token comes at all; else magnitude prunes it then.
    """

    everywhere: bool
    fate: str
    prunes = True
    helps = True

    @abstractmethod
    def solver(self, own: AnySolver) -> AnySolver:
        """What prunes it, where `own` prunes the others."""


@final
class AllTokens(Starved):
    """Pruned as the others are."""

    everywhere, fate = True, "measured on all tokens of their layer"

    def solver(self, own: AnySolver) -> AnySolver:
        return own


@final
class ByWanda(Starved):
    """Needs no more than the norms of the inputs."""

    everywhere, fate, helps = False, "pruned by wanda on the tokens they saw", False

    def solver(self, own: AnySolver) -> AnySolver:
        return Wanda()


@final
class LeftDense(Starved):
    """Not pruned, nor tuned."""

    everywhere, fate, prunes = False, "left dense", False

    def solver(self, own: AnySolver) -> AnySolver:
        return own


POLICIES: dict[str, Starved] = {"all_tokens": AllTokens(), "wanda": ByWanda(), "skip": LeftDense()}


@final
@dataclass(frozen=True)
class Coverage:
    """starved: what becomes of experts that fewer than `fewest` tokens reach; without a number, fewer than the widest
    of an expert's matrices has inputs (its Gram would be singular).
    """

    starved: Starved = POLICIES["all_tokens"]
    fewest: int | None = None

    def measure(self, stop: Stop, keys: Iterable[int], block: Block, ranks: Ranks) -> list[Facts]:
        """Counts the tokens that some batches (of all processes) send to each expert of the block, and marks the
        starved ones. One entry a layer: its name, tokens by expert, the threshold, which are starved, what becomes of
        these, and which no token reaches, so that magnitude prunes them.
        """
        layers = [experts for experts in block.experts if self._widest(experts, block)]
        tokens = {experts: torch.zeros(experts.count, dtype=torch.long) for experts in layers}
        for key in keys if layers else ():
            _count(stop, key, tokens)
        ranks.sum(list(tokens.values()))
        facts = [self._judged(experts, counts.tolist(), block) for experts, counts in tokens.items()]
        self.recall(block, facts)
        return facts

    def recall(self, block: Block, facts: Sequence[Facts]) -> None:
        """Marks the starved experts of a block as they were marked before; those that stay dense leave its matrices."""
        starved = {entry["layer"]: frozenset(entry["starved"]) for entry in facts}
        for experts in block.experts:
            experts.starved = starved.get(experts.layer, frozenset())
            experts.everywhere = experts.starved if self.starved.everywhere else frozenset()
        if not self.starved.prunes:
            block.leave([matrix for matrix in block.matrices if matrix.starved])

    def solver(self, own: AnySolver, group: Sequence[Matrix], gram: Gram) -> AnySolver:
        """What prunes matrices that share a Gram: `own`, unless their expert is starved; magnitude where nothing is
        known of their inputs.
        """
        if gram.count == 0:
            return Magnitude()
        return self.starved.solver(own) if group[0].starved else own

    def _widest(self, experts: Experts, block: Block) -> int:
        """Most inputs that one of its matrices to prune has; 0 where there is none."""
        own = [matrix.shape[1] for matrix in block.matrices if matrix.layer == experts.layer]
        return max(own, default=0)

    def _judged(self, experts: Experts, tokens: list[int], block: Block) -> Facts:
        fewest = self._widest(experts, block) if self.fewest is None else self.fewest
        pruned = {matrix.name.split(".")[-2] for matrix in block.matrices if matrix.layer == experts.layer}
        starved = [expert for expert, count in enumerate(tokens) if count < fewest and str(expert) in pruned]
        helped = starved if self.starved.helps else []
        unseen = [expert for expert, count in enumerate(tokens) if not count and str(expert) in pruned]
        facts = {"layer": experts.layer, "tokens": tokens, "fewest": fewest, "starved": starved}
        return facts | {"fate": self.starved.fate, "unseen": [expert for expert in unseen if expert not in helped]}


def _count(stop: Stop, key: int, tokens: dict[Experts, Tensor]) -> None:
    """Adds one batch. The forward ends with the last router."""
    quota = Quota(len(tokens))

    def note(experts: Experts, chosen_TK: Tensor) -> None:
        found = torch.bincount(chosen_TK.flatten().cpu(), minlength=experts.count)
        tokens[experts] += found[: experts.count]  # a number beyond the last expert stands for none
        quota.seen()

    with ExitStack() as listening, suppress(Enough):
        for experts in tokens:
            listening.enter_context(experts.listened(partial(note, experts)))
        stop.run(key)
