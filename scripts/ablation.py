"""Prunes a model with one component after the other switched on, and prints a Markdown table of perplexities, or of
top-1 accuracies and cross-entropies.

    python scripts/ablation.py MODEL --dataset FILE --eval text=FILE [--nsamples 112] [--seqlen 256] [--seeds 3]
        [--patterns 0.5 2:4 0.7] [--only balanced best] [--set KEY=VALUE ...]

Every row is a recipe (settings as --set takes them, those of the command line last); the median of the seeds counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from obsprune.pipeline import prune
from obsprune.presets import layered
from obsprune.progress import Silent
from obsprune.recipe import make_recipe
from obsprune.trees import Tree, parse_setting

ROWS: dict[str, tuple[str | None, list[str]]] = {
    "magnitude": (None, ["solver.name=magnitude"]),
    "wanda": (None, ["solver.name=wanda"]),
    "sparsegpt": (None, ["solver.name=sparsegpt"]),
    "sparsegpt, true sequential": (None, ["solver.name=sparsegpt", "engine.true_sequential=true"]),
    "fast": ("fast", []),
    "sparsegpt, exact refit": (None, ["solver.name=sparsegpt", "solver.exact=true"]),
    "admm": (None, ["solver.name=admm"]),
    "admm, corrected": (None, ["solver.name=admm", "target=corrected"]),
    "balanced": ("balanced", []),
    "admm, matched": (None, ["solver.name=admm", "matching.passes=5"]),
    "balanced, matched": ("balanced", ["matching.passes=5"]),
    "balanced, matched for 20 passes": ("balanced", ["matching.passes=20"]),
    "balanced, matched, owl": ("balanced", ["matching.passes=5", "allocation.rules=[owl]"]),
    "balanced, matched, importance": ("balanced", ["matching.passes=5", "allocation.rules=[importance]"]),
    "balanced, matched, knapsack": ("balanced", ["matching.passes=5", "allocation.rules=[knapsack]"]),
    "sparsegpt, stream": (None, ["solver.name=sparsegpt", "target=stream"]),
    "sparsegpt, 3 rounds": (None, ["solver.name=sparsegpt", "iters=3"]),
    "admm, 3 rounds": (None, ["solver.name=admm", "iters=3"]),
    "balanced, 3 rounds of one pass": ("balanced", ["iters=3"]),
    "best without matching": ("best", ["matching.passes=0"]),
    "best": ("best", []),
}
"""{row: (preset, settings)}"""


def settings_of(pattern: str) -> Tree:
    """`0.5` is a sparsity, `2:4` a pattern."""
    return {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}


METRICS = {"perplexity": ["perplexity"], "top1": ["top1", "cross_entropy"]}
"""What is told of a task, by its headline."""


def measure(row: str, pattern: str, seed: int, base: Tree, more: list[str]) -> tuple[list[float], float]:
    """(scores, seconds without the evaluation) of one run."""
    preset, words = ROWS[row]
    settings = [parse_setting(word) for word in [*words, *more]]
    recipe = make_recipe(*layered(preset, {}, base, settings_of(pattern), {"seed": seed}, *settings))
    with tempfile.TemporaryDirectory() as folder:
        report: dict[str, Any] = prune(recipe, Path(folder) / "out", Silent())
    score = next(iter(report["evaluation"].values()))["pruned"]
    return [score[name] for name in METRICS[score["metric"]]], report["seconds"]["total"] - report["seconds"][
        "evaluation"
    ]


def median(scores: list[list[float]]) -> str:
    """Of each metric."""
    return " / ".join(f"{statistics.median(values):.2f}" for values in zip(*scores, strict=True))


def main() -> None:
    """The table, row after row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--nsamples", type=int, default=112)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4", "0.7"])
    parser.add_argument("--set", nargs="+", default=[])
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS))
    given = parser.parse_args()
    data = {"dataset": given.dataset, "nsamples": given.nsamples, "seqlen": given.seqlen}
    base = {"model": {"name": given.model}, "data": data, "evaluation": [given.eval]}
    print("| |", " | ".join(given.patterns), "| seconds |\n|---|", "---|" * (len(given.patterns) + 1), sep="")
    for row in given.only:
        found = [
            [measure(row, pattern, seed, base, given.set) for seed in range(given.seeds)] for pattern in given.patterns
        ]
        scores = [median([score for score, _ in runs]) for runs in found]
        print(f"| {row} | {' | '.join(scores)} | {statistics.median(s for _, s in found[0]):.0f} |", flush=True)


if __name__ == "__main__":
    main()
