"""Which matrix gives more zeros than another: the rules of core/allocation.py, fed from the dense model, and judged by
what they lead to. Uniform shares stay unless another rule's held-out loss is lower by MARGIN.

A rule is judged after the whole one-shot stage (targets and block matching included): one that is good for a plain
layer solver can be bad after them, since they repair early blocks better than late ones (recipes/ablation).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

from obsprune.core import allocation as rules
from obsprune.core.linalg import layer_loss
from obsprune.core.patterns import Pattern, Unstructured
from obsprune.core.statistics import Gram
from obsprune.engine.dealing import Deal
from obsprune.engine.inputs import measure, require_finite, shared_inputs
from obsprune.engine.layerwise import Projection
from obsprune.engine.place import Committed, Dense, Place, Source, Store, Tensors
from obsprune.engine.rundir import Event, RunDir
from obsprune.engine.streams import Batches
from obsprune.engine.teacher import Lesson
from obsprune.models.blocks import Block
from obsprune.models.matrices import Matrix
from obsprune.progress import Progress
from obsprune.ranks import Ranks

MARGIN = 0.01
"""How much lower the held-out loss must be, as a share of it."""
Shares = dict[str, float]
OneShot = Callable[[Mapping[str, Pattern], RunDir], None]
"""Prunes the model by these patterns into a run."""


@final
@dataclass(frozen=True)
class Partly(Source):
    """The dense weights of one store, with some matrices from another."""

    names: frozenset[str]
    dense: Store
    store: Store

    def get(self, block: Block) -> Tensors:
        own = {matrix.name for matrix in block.matrices} & self.names
        pruned = self.store.get(block) if own else {}
        return self.dense.get(block) | {name: pruned[name] for name in own}


@final
@dataclass(frozen=True)
class Probe:
    """Looks at the dense model. projection: how a matrix is pruned; batches: to calibrate; judge: held-out sequences;
    sparsity: of all together.
    """

    place: Place
    projection: Projection
    sparsity: float
    batches: Batches
    judge: Lesson
    progress: Progress

    @property
    def ranks(self) -> Ranks:
        return self.place.model.ranks

    @property
    def blocks(self) -> list[Block]:
        """Those with something to prune."""
        return [block for block in self.place.model.blocks if block.matrices]

    def measured(self) -> Iterator[tuple[Block, list[tuple[Gram, list[Matrix]]]]]:
        """Block after block, dense and on the device, with its Grams."""
        self.progress.stage("probing", len(self.place.model.blocks))
        with self.place.model.walk(self.batches) as walk:
            for stop in walk:
                with self.place.at(stop.index, Dense()) as block:
                    if block.matrices:
                        self.projection.coverage.measure(stop, stop.keys, block, self.ranks)
                        yield block, measure(stop, shared_inputs(stop, block.matrices), self.ranks)
                    self.progress.step()
                    if stop.last:
                        break
                    stop.hand_on()

    def errors(self, levels: Sequence[float], target: int) -> tuple[dict[str, list[float]], Store]:
        """Relative error of each matrix pruned alone at each level; the weights at level number `target`."""
        errors: dict[str, list[float]] = {}
        store = self.place.store("alone")
        for block, measured in self.measured():
            deal = Deal.of(block.matrices, self.ranks)
            answers = {matrix.name: matrix.weight.new_empty(matrix.shape) for matrix in block.matrices}
            found = self.ranks.agree(partial(self._solved, measured, deal, levels, target, answers))
            known = {name: error for part in self.ranks.gather(found) for name, error in part.items()}
            for matrix in (matrix for _, group in measured for matrix in group):
                errors[matrix.name] = known[matrix.name]
                self.ranks.give(answers[matrix.name], deal.owner[matrix.name])
            store.put(block, answers)
        return errors, store

    def _solved(
        self,
        measured: list[tuple[Gram, list[Matrix]]],
        deal: Deal,
        levels: Sequence[float],
        target: int,
        answers: Tensors,
    ) -> dict[str, list[float]]:
        """The errors of the matrices that this process solves; their weights at level number `target` are put down."""
        errors: dict[str, list[float]] = {}
        for gram, group in measured:
            require_finite(gram)
            own = deal.own(group)
            solver = self.projection.coverage.solver(self.projection.solver, group, gram)
            state = solver.prepare(gram) if own else None
            for matrix in own:
                W_RC = matrix.read().to(gram.H_CC)
                energy = layer_loss(W_RC, gram.H_CC) or 1.0
                found = [solver.solve(W_RC, state, Unstructured(level)) for level in levels]
                errors[matrix.name] = [solution.loss / energy for solution in found]
                answers[matrix.name] = found[target].weight.to(matrix.weight.dtype)
        return errors

    def divergences(self, groups: Sequence[Sequence[str]], store: Store) -> list[float]:
        """How far the dense model moves when one group of matrices after the other is taken from the store."""
        self.progress.stage("pruned alone", len(groups))
        found, dense = [], self.place.store("dense")
        for block in self.place.model.blocks:
            dense.put(block, Dense().get(block))
        for names in groups:
            found.append(self.judge.score(Partly(frozenset(names), dense, store)).kl)
            self.progress.step()
        return found


class Rule(ABC):
    """A way to share out the zeros."""

    @abstractmethod
    def shares(self, probe: Probe) -> Shares:
        """{matrix's name: share of zeros}; the mean is roughly the target."""


@final
class OWL(Rule):
    """Blocks with many outliers lose less (Yin et al. 2024)."""

    def shares(self, probe: Probe) -> Shares:
        outliers = [
            rules.outlier_share([(matrix.read().to(gram.H_CC), gram) for gram, group in measured for matrix in group])
            for _, measured in probe.measured()
        ]
        return by_block(probe.blocks, rules.owl(outliers, probe.sparsity))


@final
class Importance(Rule):
    """Blocks whose pruning alone moves the model far lose less (LSA)."""

    def shares(self, probe: Probe) -> Shares:
        _, store = probe.errors([probe.sparsity], 0)
        groups = [[matrix.name for matrix in block.matrices] for block in probe.blocks]
        return by_block(probe.blocks, rules.by_importance(probe.divergences(groups, store), probe.sparsity))


@final
class Knapsack(Rule):
    """The least sum of probed errors, matrix by matrix. An error counts as much as it moves the model: the divergence
    when the matrix alone is pruned at the target, times its error at a level over its error there.
    """

    def shares(self, probe: Probe) -> Shares:
        levels = rules.levels_around(probe.sparsity)
        target = levels.index(probe.sparsity)
        errors, store = probe.errors(levels, target)
        moved = dict(zip(errors, probe.divergences([[name] for name in errors], store), strict=True))
        scaled = [[moved[name] * error / (e[target] or 1.0) for error in e] for name, e in errors.items()]
        sizes = sizes_of(probe.blocks)
        chosen = rules.knapsack(scaled, levels, [sizes[name] for name in errors], budget(sizes, probe.sparsity))
        return dict(zip(errors, chosen, strict=True))


RULES: dict[str, Rule] = {"owl": OWL(), "importance": Importance(), "knapsack": Knapsack()}


def by_block(blocks: Sequence[Block], shares: Sequence[float]) -> Shares:
    """One share for all matrices of a block."""
    return {matrix.name: share for block, share in zip(blocks, shares, strict=True) for matrix in block.matrices}


def sizes_of(blocks: Sequence[Block]) -> dict[str, int]:
    """Weights of each matrix."""
    return {matrix.name: matrix.shape[0] * matrix.shape[1] for block in blocks for matrix in block.matrices}


def budget(sizes: Mapping[str, int], sparsity: float) -> int:
    """As many zeros as uniform shares would give."""
    return sum(Unstructured(sparsity).pruned(1, size) for size in sizes.values())


def exact(shares: Shares, blocks: Sequence[Block], sparsity: float) -> Shares:
    """Shares whose zeros are whole and together exactly the budget."""
    sizes = sizes_of(blocks)
    zeros = rules.counts([shares[name] for name in sizes], list(sizes.values()), budget(sizes, sparsity))
    return {name: zero / sizes[name] for name, zero in zip(sizes, zeros, strict=True)}


def patterns_of(shares: Shares) -> dict[str, Pattern]:
    """What each matrix must meet."""
    return {name: Unstructured(share) for name, share in shares.items()}


def choose(names: Sequence[str], probe: Probe, one_shot: OneShot, run: RunDir) -> Event:
    """Carries out one shot with uniform shares and with those of each rule named, each in a trial inside `run`; records
    the shares to take. Trials that were finished before are not repeated.
    """
    tried = {name: run.recorded("trial", rule=name) or _try(name, probe, one_shot, run) for name in ("uniform", *names)}
    best = min(names, key=lambda name: float(tried[name]["nll"]))
    if tried[best]["nll"] > (1 - MARGIN) * tried["uniform"]["nll"]:
        best = "uniform"
    scores = {name: {"heldout_kl": event["heldout_kl"], "nll": event["nll"]} for name, event in tried.items()}
    return run.record("allocation", rule=best, tried=scores, **{key: tried[best][key] for key in ("shares", "seconds")})


def _try(name: str, probe: Probe, one_shot: OneShot, run: RunDir) -> Event:
    begin = time.perf_counter()
    shares = probe.ranks.gather(_shares(name, probe))[0]  # all machines go by the same, to the last digit
    trial, start = run.trial(name), time.perf_counter()
    one_shot(patterns_of(shares), trial)
    seconds = time.perf_counter() - start
    with probe.place.opened():
        score = probe.judge.score(Committed(trial))
    told = " ".join(f"{k} {v:.3f}" for k, v in probe.place.model.kind.told(score.nll, score.agreement).items())
    probe.progress.line(f"allocation {name}: held-out KL {score.kl:.4f}, {told}")
    facts = {"heldout_kl": score.kl, "nll": score.nll, "seconds": seconds, "spent": time.perf_counter() - begin}
    return run.record("trial", rule=name, shares=shares, **facts)


def _shares(name: str, probe: Probe) -> Shares:
    if name not in RULES:
        return dict.fromkeys(sizes_of(probe.blocks), probe.sparsity)
    with probe.place.opened():
        return exact(RULES[name].shares(probe), probe.blocks, probe.sparsity)
