"""Where a run is killed: stories for tests/test_resume.py, and for the figures of docs/reliability.md."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from killing import End, Story, Told, contents, tell
from zoo import Zoo, tokens_in

ROUNDS = ["--preset", "fast", "--iters", "2", "--set", "rounds.steps=2"]
KINDS: dict[str, list[str]] = {
    "one shot": ["--preset", "fast"],
    "two streams and matching": ["--preset", "balanced", "--set", "matching.passes=2", "--set", "matching.steps=2"],
    "rounds": ROUNDS,
    "rounds on disk": [*ROUNDS, "--set", "rounds.memory=disk", "--activations", "disk"],
    "shares": ["--preset", "fast", "--sparsity", "0.7", "--set", "allocation.rules=[owl]"],
}
WRITE, RECORD = "obsprune.models.checkpoint:write_atomic", "obsprune.engine.rundir:RunDir.record"
PRUNED, SOLVED = "obsprune.models.matrices:Matrix.write", "obsprune.solvers.base:Solver.solve"
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
    "before a trial is deleted": ("shares", [End("obsprune.engine.rundir:shutil.rmtree")]),
}  # fmt: skip


def words(model: Path, tokens: Path, kind: str) -> list[str]:
    few = ["--nsamples", "4", "--eval", "heldout", "--set", "data.heldout=4", "-q", "-o", "out"]
    return ["prune", str(model), "--dataset", str(tokens), *few, *KINDS[kind]]


Stories = dict[str, tuple[str, list[End]]]


def tried(
    folder: Path, stories: Stories, dtype: torch.dtype = torch.float32, at_random: int = 0
) -> dict[str, tuple[Told, bool]]:
    """What became of each story, and whether its result is to the byte that of a run that nothing ended; then of
    further ones that are killed twice, at random.
    """
    model, tokens = Zoo(folder)("llama", dtype), tokens_in(folder)
    kinds = list(dict.fromkeys(kind for kind, _ in stories.values()) if stories else KINDS)
    whole = tell([Story(words(model, tokens, kind), str(folder / kind)) for kind in kinds])
    assert all(one.status == [0] for one in whole), whole
    results = {kind: contents(folder / kind / "out") for kind in kinds}
    stories = stories | random_ends(at_random, {kind: one.seconds[0] for kind, one in zip(kinds, whole, strict=True)})
    told = tell([Story(words(model, tokens, kind), str(folder / name), ends) for name, (kind, ends) in stories.items()])
    found = {}
    for (name, (kind, _)), one in zip(stories.items(), told, strict=True):
        found[name] = one, 0 in one.status and contents(folder / name / "out") == results[kind]
    return found


def random_ends(count: int, seconds: dict[str, float]) -> Stories:
    """Two kills in a row, each after a random time; seconds: what each kind takes. A run may be through before."""
    dice = random.Random(0)
    kinds = [dice.choice(list(seconds)) for _ in range(count)]
    return {
        f"at random {index}: {kind}": (kind, [End(seconds=dice.uniform(0.1, 0.7 * seconds[kind])) for _ in range(2)])
        for index, kind in enumerate(kinds)
    }
