"""report.json of `finetune`: the same summary, with what was tuned, and three models where there were two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from obsprune.engine.distillation import best, judged
from obsprune.engine.retrained import outcome
from obsprune.engine.rundir import RunDir
from obsprune.errors import InputError
from obsprune.evaluate.paired import beside, paired
from obsprune.models.load import Model
from obsprune.report.report import Execution, Report, about, environment, read_report

WHO = ("dense", "pruned", "tuned")


def build_finetuning_report(
    run: RunDir, recipe: Report, model: Model, result: Model, data: Report, notices: list[str], execution: Execution
) -> Report:
    """Everything a reader of the result may ask, as plain values. model, result: the checkpoint that was read, and the
    one that was written.
    """
    matrices = _matrices(result)
    zeros, weights = (sum(matrix[key] for matrix in matrices) for key in ("zeros", "weights"))
    sparsity = {"reached": zeros / weights, "zeros": zeros, "weights": weights}
    return {
        **about(run, recipe, model, execution.command),
        "data": data,
        "sparsity": {"asked": zeros / weights, "pattern": _pattern(model.directory), **sparsity},
        "tuning": {"optimizer": "AdamW", "weights": "float32", **recipe["tuning"], "best": best(run)},
        "evaluation": _scores(run),
        "steps": _steps(run),
        "matrices": [{key: value for key, value in matrix.items() if key != "weights"} for matrix in matrices],
        "skipped": result.skipped,
        "warnings": notices,
        "seconds": {
            "total": execution.seconds,
            "steps": float(sum(event["seconds"] for event in run.events if event["kind"] == "step")),
            "evaluation": float(sum(event["seconds"] for event in run.events if event["kind"] == "score")),
        },
        **environment(execution.memory),
    }


def _pattern(directory: Path) -> str:
    """The rule that the zeros obey, where the run that made them has told it."""
    try:
        return str(read_report(directory)["sparsity"]["pattern"])
    except (InputError, LookupError, TypeError):
        return "as it was"


def _matrices(result: Model) -> list[Report]:
    """One entry a matrix, as it is stored."""
    found = []
    for block in result.blocks:
        with block.loaded(result.device):
            for matrix in block.matrices:
                rows, columns = matrix.shape
                dtype = str(matrix.stored).removeprefix("torch.")
                found.append({"block": block.name, **outcome(matrix), "dtype": dtype, "weights": rows * columns})
    return found


def _steps(run: RunDir) -> list[Report]:
    """What was said of the model as it was given (step 0), and after the steps at which it was judged."""
    return [{key: value for key, value in event.items() if key != "kind"} for event in judged(run)]


def _scores(run: RunDir) -> Report:
    """{task: {dense, pruned, tuned: score; ratio and paired: tuned beside pruned, item by item; recovered: the share of
    the perplexity that pruning has added which is gone again}}; without a teacher nothing is known of the dense model.
    """
    scores: Report = {}
    for event in run.events:
        if event["kind"] == "score":
            scores.setdefault(event["task"], {})[event["who"]] = event
    return {task: _compared(trio) for task, trio in scores.items() if "tuned" in trio}


def _compared(trio: dict[str, Any]) -> Report:
    tuned, pruned = trio["tuned"], trio["pruned"]
    told = {
        who: {k: v for k, v in trio[who].items() if k not in ("kind", "task", "who", "items")}
        for who in WHO
        if who in trio
    }
    return {
        **told,
        **beside(tuned, pruned),
        **_recovered(trio),
        "paired": paired(tuned["items"], pruned["items"]),
    }


def _recovered(trio: dict[str, Any]) -> dict[str, float]:
    metric = trio["pruned"]["metric"]
    dense = trio.get("dense", trio["pruned"])[metric]
    lost = trio["pruned"][metric] - dense
    return {"recovered": (trio["pruned"][metric] - trio["tuned"][metric]) / lost} if lost else {}
