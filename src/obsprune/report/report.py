"""report.json: one stable, versioned summary of a run, made from its journal."""

from __future__ import annotations

import json
import math
import platform
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from obsprune import __version__
from obsprune.engine.rundir import REPORT, RunDir
from obsprune.errors import InputError
from obsprune.evaluate.paired import beside, paired
from obsprune.models.caution import is_dir, read_json
from obsprune.models.checkpoint import write_text
from obsprune.models.load import DEMO, Model
from obsprune.models.origin import CARD, licence, origin
from obsprune.report.card import make_card
from obsprune.report.page import PAGES

SCHEMA = 1
GOOD_FOR = (
    "Plain dense safetensors with exact zeros: for compression on disk, sparse fine-tuning and research. "
    "It is not smaller in memory and not faster in ordinary inference servers."
)
PACKED_GOOD_FOR = (
    "Packed safetensors: for transformers after `import obsprune`, and for everything else once `obsprune unpack` has "
    "made plain ones of them. Smaller on disk only: not in memory, and not faster in ordinary inference servers."
)
Report = dict[str, Any]


@dataclass(frozen=True)
class Execution:
    """What a report says about the process beside the result. seconds: of all of it; memory: the most bytes, as of
    MemoryWatch; command: the line that started it, without secrets.
    """

    seconds: float
    memory: Mapping[str, int]
    command: str


def build_report(
    run: RunDir,
    recipe: Report,
    model: Model,
    data: Report,
    notices: list[str],
    execution: Execution,
) -> Report:
    """Everything a reader of the result may ask, as plain values."""
    matrices = _matrices(run, model)
    return {
        **about(run, recipe, model, execution.command),
        "data": data,
        "sparsity": _reached(matrices, recipe["sparsity"], recipe["pattern"]),
        "allocation": _allocation(run),
        "matching": _matching(run),
        "coverage": _coverage(run),
        "evaluation": _scores(run),
        "rounds": _rounds(run, data),
        "matrices": matrices,
        "skipped": model.skipped,
        "warnings": [*notices, *_rescues(matrices, recipe)],
        "seconds": {"total": execution.seconds, **_seconds(run)},
        **environment(execution.memory),
        **_packed(run),
    }


def build_training_report(
    run: RunDir,
    recipe: Report,
    model: Model,
    data: Report,
    notices: list[str],
    execution: Execution,
) -> Report:
    """The same of `train-prune`, with its steps instead of rounds, and what was trained."""
    matrices, steps = _matrices(run, model), _steps(run)
    damaged = list(dict.fromkeys(name for step in steps for name in step["damaged"]))
    left_out = [f"{len(damaged):,} images cannot be read and were not trained on: {', '.join(damaged)}"]
    return {
        **about(run, recipe, model, execution.command),
        "data": data,
        "sparsity": _reached(matrices, recipe["sparsity"], "unstructured"),
        "training": {"optimizer": "Adam", "weights": "float32", **recipe["training"], **_trained(model)},
        "evaluation": _scores(run),
        "steps": steps,
        "matrices": matrices,
        "skipped": model.skipped,
        "warnings": [*notices, *(left_out if damaged else [])],
        "seconds": {
            "total": execution.seconds,
            "steps": float(sum(step["seconds"] for step in steps)),
            "evaluation": float(sum(e["seconds"] for e in run.events if e["kind"] == "score")),
        },
        **environment(execution.memory),
    }


def about(run: RunDir, recipe: Report, model: Model, command: str) -> Report:
    """Which run of which model."""
    local = Path(recipe["model"]["name"]).expanduser()
    source = local if is_dir(local) and str(local) != DEMO else model.directory
    return {
        "schema": SCHEMA,
        "output": str(run.path),
        "command": command,
        "recipe": recipe,
        "model": {
            "source": recipe["model"]["name"],
            "base": origin(source),
            "licence": licence(source, model.config),
            "type": model.config.model_type,
            "kind": model.kind.name,
            "parameters": sum(torch.Size(h.shape).numel() for h in model.checkpoint.headers.values()),
            "compute_dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
    }


def environment(memory: Mapping[str, int]) -> Report:
    return {
        "memory": dict(memory),
        "peak_memory_bytes": peak_memory(),
        "versions": {
            "obsprune": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors", "tokenizers", "datasets")},
        },
        "good_for": GOOD_FOR,
    }


def _matrices(run: RunDir, model: Model) -> list[Report]:
    """One entry a matrix; what a block was committed as last counts."""
    blocks = {event["name"]: event for event in run.events if event["kind"] == "block"}
    stored = {matrix.name: str(matrix.stored).removeprefix("torch.") for matrix in model.matrices}
    return [
        {"block": block["name"], **matrix, "dtype": stored[matrix["name"]]}
        for block in blocks.values()
        for matrix in block["matrices"]
    ]


def _reached(matrices: list[Report], asked: float, pattern: str) -> Report:
    zeros, total = (
        sum(part) for part in zip(*((m["zeros"], m["shape"][0] * m["shape"][1]) for m in matrices), strict=True)
    )
    return {"asked": asked, "pattern": pattern, "reached": zeros / total, "zeros": zeros, "weights": total}


def _steps(run: RunDir) -> list[Report]:
    """One entry a step: sparsity, training loss of its last epoch, seconds, images left out."""
    return [{k: v for k, v in event.items() if k != "kind"} for event in run.events if event["kind"] == "step"]


def _trained(model: Model) -> Report:
    """How many numbers were trained, and the names of all that was not."""
    inside = sum(p.numel() for block in model.blocks for p in block.module.parameters())
    return {"parameters": inside, "frozen": model.rest}


def _scores(run: RunDir) -> Report:
    """{task: {dense: score, pruned: score, paired: pruned − dense by item, ratio of perplexities}}."""
    scores: Report = {}
    items: dict[tuple[str, str], Any] = {}
    for event in run.events:
        if event["kind"] == "score":
            score = {key: value for key, value in event.items() if key not in ("kind", "task", "who", "items")}
            scores.setdefault(event["task"], {})[event["who"]] = score
            items[event["task"], event["who"]] = event["items"]
    scores = {task: pair for task, pair in scores.items() if "pruned" in pair}  # others were asked for formerly
    for task, pair in scores.items():
        pair |= beside(pair["pruned"], pair["dense"])
        pair["paired"] = paired(items[task, "pruned"], items[task, "dense"])
    return scores


def _allocation(run: RunDir) -> Report:
    """Which rule shared out the zeros, and what each one tried led to on held-out text."""
    event = run.recorded("allocation")
    return {key: event[key] for key in ("rule", "tried")} if event else {"rule": "uniform", "tried": {}}


def _matching(run: RunDir) -> list[Report]:
    """What matching did to each block."""
    events = [event for event in run.events if event["kind"] == "block" and event.get("matching")]
    return [{"block": event["name"], **event["matching"]} for event in events]


def _coverage(run: RunDir) -> list[Report]:
    """One entry a layer of experts: the calibration tokens each of them saw, how many were asked for, which saw fewer,
    and what became of those.
    """
    blocks = {event["name"]: event for event in run.events if event["kind"] == "block"}
    return [entry for block in blocks.values() for entry in block.get("coverage", [])]


def _seconds(run: RunDir) -> Report:
    """Of the parts, over all processes that worked on the run."""

    def spent(kind: str) -> float:
        return float(sum(e["seconds"] for e in run.events if e["kind"] == kind and e.get("round") != 1))

    pruning, rounds, evaluation = spent("block"), spent("round"), spent("score")
    return {"allocation": _spent_on_trials(run), "pruning": pruning, "rounds": rounds, "evaluation": evaluation}


def _spent_on_trials(run: RunDir) -> float:
    """Seconds of probing and of the trials that were not taken."""
    event = run.recorded("allocation")
    return sum(e["spent"] for e in run.events if e["kind"] == "trial") - event["seconds"] if event else 0.0


def _rounds(run: RunDir, data: Report) -> list[Report]:
    """One entry a round: held-out divergence (None for an infinite one, which is no number in JSON) and perplexity,
    step, rate, share of the mask that moved, seconds.
    """
    rounds: list[Report] = [
        {key: None if value == math.inf else value for key, value in event.items() if key not in ("kind", "matrices")}
        for event in run.events
        if event["kind"] == "round"
    ]
    best = max((entry["round"] for entry in rounds if entry["kept"]), default=None)
    fresh = data.get("rounds", {}).get("fresh", [])
    return [entry | {"best": entry["round"] == best, "fresh": fresh[entry["round"] - 1]} for entry in rounds]


def _packed(run: RunDir) -> Report:
    """What a packed result says otherwise: how many bytes its weights have, and what they are good for."""
    event = run.recorded("packed")
    if event is None:
        return {}
    sizes = {key: event[key] for key in ("dense_bytes", "packed_bytes", "share", "seconds")}
    return {"packed": sizes, "good_for": PACKED_GOOD_FOR}


def _rescues(matrices: list[Report], recipe: Report) -> list[str]:
    asked = recipe["solver"].get("damping", 0.0)
    return [
        f"{matrix['name']}: the factorisation needed damping {matrix['damping']:g} instead of {asked:g}"
        for matrix in matrices
        if matrix["damping"] > max(asked, 0.01 if recipe["solver"]["refit"] else 0.0)
    ]


def peak_memory() -> dict[str, int]:
    """Bytes: resident host memory, and device memory where there is a device."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def write_report(run: RunDir, report: Report) -> None:
    """Writes report.json, and what is made of it, into the run's directory: the card, report.html and report.md."""
    told = finite(report)
    texts = {
        REPORT: json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        CARD: make_card(told),
        **{name: make(told) for name, make in PAGES.items()},
    }
    for name, text in texts.items():  # all of them are made before the first one is there
        write_text(run.path / name, text)


def finite(tree: Any) -> Any:
    """Nested plain values as JSON can hold them: null for numbers that are none, or infinite."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def read_report(directory: Path) -> Report:
    """The report of a finished run. Raises InputError when there is none, or it is not one."""
    path = directory / REPORT
    if not path.is_file():
        raise InputError(f"{directory} has no {REPORT}: it was not made by obsprune, or the run is not finished")
    report = read_json(path)
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a report of this version (schema {SCHEMA})")
    return report
