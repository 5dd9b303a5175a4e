"""Where a run is killed: stories for tests/test_resume.py, and for the figures of docs/reliability.md."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from killing import End, Forks, Story, Told, contents
from zoo import Zoo, tokens_in

ROUNDS = ["--preset", "fast", "--iters", "2", "--set", "rounds.steps=2"]
KINDS: dict[str, list[str]] = {
    "one shot": ["--preset", "fast"],
    "two streams and matching": ["--preset", "balanced", "--set", "matching.passes=2", "--set", "matching.steps=2"],
    "rounds": ROUNDS,
    "rounds on disk": [*ROUNDS, "--set", "rounds.memory=disk", "--activations", "disk"],
    "packed": ["--preset", "fast", "--format", "packed"],
    "shares": ["--preset", "fast", "--sparsity", "0.7", "--set", "allocation.rules=[owl]"],
}
WRITE, RECORD = "obsprune.models.checkpoint:write_atomic", "obsprune.engine.rundir:RunDir.record"
PRUNED, SOLVED = "obsprune.models.matrices:Matrix.write", "obsprune.solvers.base:Solver.solve"
UNLINK = "obsprune.engine.packing:Path.unlink"
RESULT = "obsprune.pipeline:evaluate_result"
POINTS: dict[str, tuple[str, list[End]]] = {
    "before the first block": ("one shot", [End(RECORD, 2)]),
    "inside a matrix": ("one shot", [End(PRUNED, 6)]),
    "inside a shard's file": ("one shot", [End(WRITE, 3, share=0.5)]),
    "an empty shard's file": ("one shot", [End(WRITE, 3, share=0)]),
    "between a shard's file and its name": ("one shot", [End(WRITE, 3, share=1)]),
    "between a shard and its line": ("one shot", [End(RECORD, 4)]),
    "inside a line of the journal": ("one shot", [End(RECORD, 4, share=0.5)]),
    "inside the first line of the journal": ("one shot", [End(RECORD, 1, share=0.5)]),
    "inside the recipe's file": ("one shot", [End(WRITE, 1, share=0.5)]),
    "inside the last shard": ("one shot", [End(WRITE, 5, share=0.5)]),
    "inside the index": ("one shot", [End(WRITE, 6, share=0.5)]),
    "before the side files": ("one shot", [End("obsprune.engine.rundir:copy_side_files")]),
    "inside the config": ("one shot", [End(WRITE, 8, share=0.5)]),
    "before the result is evaluated": ("one shot", [End(RESULT)]),
    "between two batches of an evaluation": ("one shot", [End("obsprune.models.walk:Walk.resume", 14)]),
    "before the report": ("one shot", [End("obsprune.pipeline:write_report")]),
    "inside the report": ("one shot", [End(WRITE, 9, share=0.5)]),
    "inside the card": ("one shot", [End(WRITE, 10, share=0.5)]),
    "inside the page of the report": ("one shot", [End(WRITE, 11, share=0.5)]),
    "between the report's page and its text": ("one shot", [End(WRITE, 12, share=0)]),
    "inside the last line of the journal": ("one shot", [End(RECORD, 8, share=0.5)]),
    "three times, and twice while it goes on": ("one shot", [End(PRUNED, 2), End(PRUNED, 6), End(WRITE, 4, share=0.5)]),
    "measuring two streams": ("two streams and matching", [End("obsprune.engine.streams:_Pairs.observe", 12)]),
    "inside matching": ("two streams and matching", [End("obsprune.engine.matching:_Learner.step", 2)]),
    "inside fine-tuning": ("rounds", [End("obsprune.engine.finetune:Tuning._update", 8)]),
    "inside a round's projection": ("rounds", [End(SOLVED, 25)]),
    "keeping an iterate": ("rounds", [End("obsprune.engine.rounds:keep")]),
    "inside an iterate's file": ("rounds", [End(WRITE, 6, share=0.5)]),
    "before a round's line": ("rounds", [End("obsprune.engine.rounds:Rounds._record", 2)]),
    "writing the best iterate": ("rounds", [End("obsprune.engine.rounds:Rounds._finish"), End(WRITE, 3, share=0.5)]),
    "rounds, before the result is evaluated": ("rounds", [End(RESULT)]),
    "fine-tuning with files": ("rounds on disk", [End("obsprune.engine.finetune:Tuning._update", 8)]),
    "inside the first trial": ("shares", [End(PRUNED, 6)]),
    "probing for the second trial": ("shares", [End("obsprune.engine.allocation:_shares", 2)]),
    "inside the second trial": ("shares", [End(WRITE, 6, share=0.5)]),
    "taking over a trial": ("shares", [End(RECORD, 9)]),
    "inside a packed file": ("packed", [End("obsprune.models.packed:write_atomic", 2, share=0.5)]),
    "between packed files and their index": ("packed", [End("obsprune.models.packed:write_text")]),
    "between packed files and their config": ("packed", [End("obsprune.engine.packing:packed_config", 2)]),
    "reading packed files back": ("packed", [End("obsprune.models.packed:PackedFile.read", 5)]),
    "inside the line that says packed": ("packed", [End(RECORD, 8, share=0.5)]),
    "before the dense files are deleted": ("packed", [End("obsprune.pipeline:drop_dense")]),
    "between two dense files": ("packed", [End(UNLINK, 3), End(UNLINK, 1)]),
    "packed, before the report": ("packed", [End("obsprune.pipeline:write_report")]),
    "before a trial is deleted": ("shares", [End("obsprune.engine.rundir:shutil.rmtree")]),
}  # fmt: skip


def words(model: Path, tokens: Path, kind: str) -> list[str]:
    few = ["--nsamples", "4", "--eval", "heldout", "--set", "data.heldout=4", "-q", "-o", "out"]
    return ["prune", str(model), "--dataset", str(tokens), *few, *KINDS[kind]]


Stories = dict[str, tuple[str, list[End]]]


@dataclass(frozen=True)
class Whole:
    """A run that nothing ended: how long it took, and the files of its result."""

    seconds: float
    contents: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where stories are tried: a model and its tokens in `folder`; whole: what comes of runs that nothing ended, each
    of which is made once.
    """

    folder: Path
    forks: Forks
    dtype: torch.dtype = torch.float32
    whole: dict[str, Whole] = field(default_factory=dict)

    @cached_property
    def sources(self) -> tuple[Path, Path]:
        return Zoo(self.folder)("llama", self.dtype), tokens_in(self.folder)

    def tried(self, stories: Stories) -> dict[str, tuple[Told, bool]]:
        """What became of each story, and whether its result is to the byte that of a run that nothing ended."""
        self.need(kind for kind, _ in stories.values())
        told = self.forks.tell([self._story(name, kind, ends) for name, (kind, ends) in stories.items()])
        return {
            name: (one, 0 in one.status and contents(self.folder / name / "out") == self.whole[kind].contents)
            for (name, (kind, _)), one in zip(stories.items(), told, strict=True)
        }

    def tried_at_random(self, count: int) -> dict[str, tuple[Told, bool]]:
        """The same of so many runs of any kind that are killed twice, at random."""
        self.need(KINDS)
        return self.tried(random_ends(count, {kind: self.whole[kind].seconds for kind in KINDS}))

    def need(self, kinds: Iterable[str]) -> None:
        """Makes the whole runs of these kinds, where there are none."""
        new = [kind for kind in dict.fromkeys(kinds) if kind not in self.whole]
        for kind, one in zip(new, self.forks.tell([self._story(kind, kind, []) for kind in new]), strict=True):
            assert one.status == [0], one
            self.whole[kind] = Whole(one.seconds[0], contents(self.folder / kind / "out"))

    def _story(self, name: str, kind: str, ends: list[End]) -> Story:
        return Story(words(*self.sources, kind), str(self.folder / name), ends)


def tried(folder: Path, stories: Stories, at_random: int = 0) -> dict[str, tuple[Told, bool]]:
    """What became of these stories, and of so many random ones."""
    with Forks() as forks:
        bench = Bench(folder, forks)
        return bench.tried(stories) | bench.tried_at_random(at_random)


def random_ends(count: int, seconds: dict[str, float]) -> Stories:
    """Two kills in a row, each after a random time; seconds: what each kind takes. A run may be through before."""
    dice = random.Random(0)
    kinds = [dice.choice(list(seconds)) for _ in range(count)]
    return {
        f"at random {index}: {kind}": (kind, [End(seconds=dice.uniform(0.1, 0.7 * seconds[kind])) for _ in range(2)])
        for index, kind in enumerate(kinds)
    }
