"""Finished runs as their directories hold them, with numbers of our own: no model is pruned for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from obsprune.engine.rundir import REPORT, RunDir
from obsprune.ranks import ALONE
from obsprune.recipe import make_recipe

LOSSES = (0.9, 1.1, 1.0, 0.8, 1.2, 1.05, 0.95, 1.3)
"""The dense model's, of eight sequences."""
LIBRARIES = ("obsprune", "python", "torch", "transformers", "safetensors", "tokenizers", "datasets")


def score(losses: Sequence[float], **protocol: Any) -> dict[str, Any]:
    """As Perplexity reports it; perplexity stands for any number that falls with the losses."""
    nll = sum(losses) / len(losses)
    told = {"corpus": "heldout", "join": "kept apart", "stride": 32, "sequences": len(losses), "seqlen": 32}
    values = {"metric": "perplexity", "perplexity": 2.718281828**nll, "nll": nll, "predicted_tokens": 31 * len(losses)}
    return {
        **values,
        **told,
        "tokens": 32 * len(losses),
        "first_token": 1,
        "sha256": "a" * 64,
        "seconds": 0.1,
        **protocol,
    }


def make_run(
    path: Path,
    worse: float = 0.1,
    sparsity: float = 0.5,
    settings: Mapping[str, Any] | None = None,
    dense: Sequence[float] = LOSSES,
    task: str = "heldout",
    finished: bool = True,
    **changes: Any,
) -> Path:
    """A run whose losses are `worse` than the dense model's, a little more so in every other sequence.

    settings: of its recipe; changes: of the protocol (seqlen=…, sha256=…), or of parts of the report (model={…}, …).
    """
    path.mkdir(parents=True)
    pruned = [loss + worse * (1 + 0.2 * (index % 2)) for index, loss in enumerate(dense)]
    protocol = {key: value for key, value in changes.items() if key not in ("model", "versions", "rounds")}
    scores = {"dense": score(dense, **protocol), "pruned": score(pruned, **protocol)}
    recipe = make_recipe({"model": {"name": "some/model"}, "sparsity": sparsity}, settings or {}).tree()
    zeros = round(8192 * sparsity)
    report = base_report(path, recipe, zeros) | {"evaluation": {task: scores}}
    for part in ("model", "versions"):
        report[part] |= changes.get(part, {})
    report["rounds"] = changes.get("rounds", [])
    (path / REPORT).write_text(json.dumps(report))
    run = RunDir(path, [], ALONE)
    run.record("start", facts={})
    for who, items in (("dense", dense), ("pruned", pruned)):
        run.record("score", task=task, who=who, **scores[who], items={"nll": list(items)})
    if finished:
        run.record("end")
    (path / "model-00001-of-00001.safetensors").write_bytes(b"0" * 20_000)
    return path


def change_report(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same run with another report.json."""
    report = json.loads((path / REPORT).read_text())
    change(report)
    (path / REPORT).write_text(json.dumps(report))
    return path


def base_report(path: Path, recipe: dict[str, Any], zeros: int) -> dict[str, Any]:
    """Everything but scores."""
    matrix = {"block": "layers.0", "name": "layers.0.q", "shape": [64, 128], "zeros": zeros, "sparsity": zeros / 8192,
              "loss": 1.0, "error": 0.01, "damping": 0.01, "tokens": 256, "seconds": 0.1, "correction": 0.0,
              "residual": False, "dtype": "float32"}  # fmt: skip
    return {
        "schema": 1,
        "output": str(path),
        "command": "obsprune prune some/model",
        "recipe": recipe,
        "model": {"source": "some/model", "base": None, "licence": {}, "type": "llama", "kind": "causal language model",
                  "parameters": 10_000, "compute_dtype": "float32", "device": "cpu"},
        "data": {"dataset": "c4", "unit": "sequences", "sequences": 128, "seqlen": 32, "tokens": 4096, "heldout": 8,
                 "sha256": "c" * 64, "heldout_sha256": "a" * 64},
        "sparsity": {"asked": zeros / 8192, "pattern": recipe["pattern"], "reached": zeros / 8192, "zeros": zeros,
                     "weights": 8192},
        "allocation": {"rule": "uniform", "tried": {}},
        "matching": [],
        "coverage": [],
        "rounds": [],
        "matrices": [matrix],
        "skipped": {"embed": "embedding"},
        "warnings": [],
        "seconds": {"total": 3.0, "allocation": 0.0, "pruning": 2.0, "rounds": 0.0, "evaluation": 1.0},
        "memory": {"host_bytes": 10**9},
        "peak_memory_bytes": {"host": 10**9},
        "versions": dict.fromkeys(LIBRARIES, "1.0"),
        "good_for": "tests",
    }  # fmt: skip
