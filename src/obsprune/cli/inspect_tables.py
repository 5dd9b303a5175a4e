"""What `obsprune inspect` shows: lists of matrices, and maps of their zeros and errors."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from rich.table import Table

from obsprune.cli.heat import heat_maps
from obsprune.cli.tables import add_row, new_table, plain, times

SAID = {"error": ".4f", "damping": "g", "seconds": ".2f"}
"""What a layer solver says of a matrix, and how it is written."""


def inspect_table(result: dict[str, Any]) -> str:
    """One line a matrix, with what its solver said, where one was asked."""
    told = {name: form for name, form in SAID.items() if name in result["matrices"][0]}
    table = new_table("", ["matrix", "shape", "sparsity", *told, "stored as"])
    for matrix in result["matrices"]:
        rows, columns = matrix["shape"]
        said = (_written(matrix[name], form) for name, form in told.items())
        add_row(table, matrix["name"], f"{rows} x {columns}", f"{matrix['sparsity']:.4f}", *said, matrix["dtype"])
    coverage = [_coverage_table(result["coverage"])] if result["coverage"] else []
    total, text = result["sparsity"], plain(*coverage, table, *heat_maps(result["matrices"]))
    return f"{text}\n{total['zeros']:,} of {total['weights']:,} weights are zero ({total['reached']:.4f})"


def _written(value: float | None, form: str) -> str:
    """A number, or a dash: one that is not finite is null in a report."""
    return "-" if value is None else format(value, form)


def _coverage_table(layers: list[dict[str, Any]]) -> Table:
    """How many calibration tokens the experts of each layer saw."""
    table = new_table("tokens an expert saw", ["experts of", "number", "least", "median", "most", "starved", "fate"])
    for layer in layers:
        tokens, starved = layer["tokens"], len(layer["starved"])
        cells = len(tokens), min(tokens), f"{median(tokens):g}", max(tokens), starved, layer["fate"] if starved else ""
        add_row(table, layer["layer"], *cells)
    return table


def survey_table(found: dict[str, Any]) -> str:
    """What would be pruned, what stays dense and why, and the sums."""
    matrices = new_table("would be pruned", ["matrix", "shape", "stored as"])
    for (name, shape, dtype), count in Counter((m["alike"], _shape(m), m["dtype"]) for m in found["matrices"]).items():
        add_row(matrices, times(name, count), shape, dtype)
    dense = new_table("stays dense", ["weight", "why", "shape", "stored as"], left=2)
    for weight in found["skipped"]:
        add_row(dense, weight["name"], weight["why"], _shape(weight), weight["dtype"] or "another weight")
    facts = new_table("checkpoint", ["", ""], left=2)
    dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in found["dtypes"].items())
    add_row(facts, "model", f"{found['architecture']} ({found['type']}), {found['kind']}")
    add_row(facts, "stored", f"{dtypes}; {found['bytes'] / 1e6:,.1f} MB in {', '.join(found['files'])}")
    share = f"{found['prunable'] / found['parameters']:.1%} of the numbers stored"
    where = f"{len(found['matrices'])} matrices of {len(found['blocks'])} blocks"
    add_row(facts, "to prune", f"{found['prunable']:,} weights in {where}, {share}")
    for key in found["unknown"]:
        add_row(facts, "kept as it is", f"{key}: the model has no place for it")
    add_row(facts, "zeros", "not counted; --zeros reads the weights and shows where they are")
    return plain(matrices, dense, facts)


def _shape(entry: dict[str, Any]) -> str:
    return " x ".join(map(str, entry["shape"]))
