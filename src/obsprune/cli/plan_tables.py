"""Plans as tables: what `--dry-run` says."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from rich.table import Table

from obsprune.cli.tables import add_row, new_table, seconds, times


def _method(recipe: Any) -> dict[str, str]:
    """What will be done, one line a component."""
    lines = {
        "solver": ", ".join(f"{key} {value}" if key != "name" else str(value) for key, value in recipe.solver.items()),
        "target": recipe.target,
    }
    if recipe.matching.passes:
        lines["matching"] = f"{recipe.matching.passes} passes over each block at rate {recipe.matching.rate:g}"
    if recipe.rules:
        lines["allocation"] = f"uniform or {', '.join(recipe.rules)}, whichever is best on what is held out"
    return lines


def dry_run_tables(outlook: Any) -> list[Table]:
    """What would be pruned, what would not and why, on how many tokens, and what it will take."""
    plan = outlook.plan
    zeros = "zeros each, if uniform" if plan.recipe.rules else "zeros each"
    matrices = new_table("to prune", ["matrix", "number", "rows", "columns", zeros])
    told = ((generic(m.alike), *m.shape, plan.patterns[m.name].pruned(*m.shape)) for m in plan.model.matrices)
    for (name, rows, columns, pruned), count in Counter(told).items():
        add_row(matrices, name, count, f"{rows:,}", f"{columns:,}", f"{pruned:,}")
    method = new_table("method", ["", ""], left=2)
    for key, value in _method(plan.recipe).items():
        add_row(method, key, value)
    facts = new_table("calibration", ["", ""], left=2)
    for key, value in plan.draw.facts.items():
        if key != "rounds":
            add_row(facts, key, value)
    if plan.recipe.iters > 1:
        seen, unit = plan.draw.facts["rounds"]["seen"], plan.draw.facts["unit"]
        add_row(facts, "rounds", f"{plan.recipe.iters}, on {seen} different {unit} together")
    for notice in outlook.notices:
        add_row(facts, "note", notice)
    blocks = f"{len(plan.model.blocks)} blocks"
    return [matrices, _skipped_table(plan.model), method, facts, _costs_table(blocks, outlook)]


def generic(name: str) -> str:
    """A name with its numbers left out: the same for matrices that differ in their block or filter alone."""
    return re.sub(r"\[\d+\]", "[*]", re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))


def size(count: int) -> str:
    """Bytes as a person says them."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _costs_table(title: str, outlook: Any) -> Table:
    """Estimated time, memory and disk, beside what there is."""
    costs = new_table(f"about, for {title}", ["", ""], left=2)
    expected, needs, free = outlook.forecast, outlook.needs.tree(), outlook.free.tree()
    if expected:
        told = ", ".join(f"{name} {seconds(value)}" for name, value in expected.seconds.items())
        add_row(costs, "time", f"{seconds(expected.total)} ({told})")
        if expected.unknown:
            add_row(costs, "", f"and what these take: {', '.join(expected.unknown)}")
    for key, name in {"device_bytes": "device memory", "host_bytes": "host memory", "disk_bytes": "disk"}.items():
        if key in needs:
            add_row(costs, name, f"{size(needs[key])}, of {size(free[key])} that it can have")
    return costs


def _skipped_table(model: Any) -> Table:
    skipped = new_table("stays dense", ["weight", "why"], left=2)
    for (name, why), count in Counter((generic(name), why) for name, why in model.skipped.items()).items():
        add_row(skipped, times(name, count), why)
    return skipped


def training_dry_run_tables(plan: Any) -> list[Table]:
    """What would be pruned, what would not and why, how sparse after each step, and on how many images."""
    matrices = new_table("to prune", ["matrix", "rows", "columns"])
    for matrix in plan.model.matrices:
        add_row(matrices, matrix.name, *matrix.shape)
    part, course, data = plan.recipe.training, plan.course, plan.facts
    by = part.method if part.curvature == "none" else f"{part.method}, curvature {part.curvature}"
    updates = f"{data['updates']:,} in {len(course.sparsities)} x {part.epochs} epochs over {data['trained']:,} images"
    method = new_table("course", ["", ""], left=2)
    add_row(method, "method", by)
    add_row(method, "sparsities", ", ".join(f"{sparsity:.4g}" for sparsity in course.sparsities))
    add_row(method, "optimizer steps", f"{updates}, Adam from {part.lr:g} to 0 in each step")
    facts = new_table("images", ["", ""], left=2)
    for key, value in data.items():
        add_row(facts, key, value)
    for notice in plan.common.notices:
        add_row(facts, "note", notice)
    return [matrices, _skipped_table(plan.model), method, facts]
