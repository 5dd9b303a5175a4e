"""What `finetune` says: its plan for --dry-run, and its report."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from obsprune.cli.tables import add_row, amount, change, new_table, seconds, short


def finetune_dry_run_tables(plan: Any) -> list[Table]:
    """What would be trained toward what, and on how much."""
    part, data = plan.recipe.tuning, plan.common.draw.facts
    zeros, held = sum(plan.zeros.values()), sum(r * c for r, c in (matrix.shape for matrix in plan.model.matrices))
    epochs = part.steps * part.batch_size / len(plan.common.draw.calibration)
    course = new_table("course", ["", ""], left=2)
    for key, value in {
        "zeros kept": f"{zeros:,} of {held:,} weights in {len(plan.zeros)} matrices ({zeros / held:.4f})",
        "loss": _loss(part),
        "steps": f"{part.steps} of {part.batch_size} {data['unit']}, {epochs:.2g} times over all of them",
        "rate": f"AdamW, up to {part.lr:g} in {part.warmup:.0%} of the steps, then down to 0 along a cosine",
        "held out": f"judged every {part.every} steps by {data['heldout']} {data['unit']}; the best step is the result",
        "memory": f"{plan.bytes / 1e9:.2f} GB before any activation, in each process",
    }.items():
        add_row(course, key, value)
    facts = new_table("data", ["", ""], left=2)
    for key, value in data.items():
        add_row(facts, key, value)
    for notice in plan.common.notices:
        add_row(facts, "note", notice)
    return [course, facts]


def _loss(part: Any) -> str:
    if not part.teacher:
        return "the next token"
    rest = f", {1 - part.distill:g} of the model's own loss" if part.distill < 1 else ""
    return f"divergence from {part.teacher} at temperature {part.temperature:g}{rest}"


def finetune_tables(report: dict[str, Any]) -> list[Table]:
    """The steps, the three models on each task, and the facts of the run."""
    steps = new_table("steps", ["step", "training loss", "held-out loss", "time"])
    best = report["tuning"]["best"]
    for step in report["steps"]:
        loss, spent = (f"{step['loss']:.4f}", seconds(step["seconds"])) if step["number"] else ("", "")
        add_row(
            steps, f"{step['number']}{' *' if step['number'] == best else ''}", loss, f"{step['heldout']:.4f}", spent
        )
    scores = [_scores_table(report["evaluation"])] if report["evaluation"] else []
    return [steps, *scores, _facts_table(report)]


def _scores_table(evaluation: dict[str, Any]) -> Table:
    scores = new_table("evaluation", ["task", "metric", "dense", "pruned", "tuned", "change", "p", "recovered", "on"])
    for task, trio in evaluation.items():
        metric = trio["tuned"]["metric"]
        numbers = (f"{trio[who][metric]:.3f}" if who in trio else "" for who in ("dense", "pruned", "tuned"))
        gone = f"{trio['recovered']:.1%}" if "recovered" in trio else ""
        add_row(
            scores, short(task), metric, *numbers, *change(trio["tuned"], trio["pruned"], trio), gone,
            amount(trio["tuned"]),
        )  # fmt: skip
    return scores


def _facts_table(report: dict[str, Any]) -> Table:
    facts = new_table("result", ["", ""], left=2)
    sparsity, memory = report["sparsity"], report["memory"]
    kept = f"{sparsity['zeros']:,} of {sparsity['weights']:,} weights in {len(report['matrices'])} matrices are zero"
    add_row(facts, "sparsity", f"{kept} ({sparsity['reached']:.4f})")
    add_row(facts, "time", seconds(report["seconds"]["total"]))
    peak = ", ".join(f"{value / 1e9:.2f} GB {key.removesuffix('_bytes')}" for key, value in memory.items())
    add_row(facts, "peak memory", peak)
    add_row(facts, "steps", "* the best on what was held out: the result")
    for warning in report["warnings"]:
        add_row(facts, "note", warning)
    return facts
