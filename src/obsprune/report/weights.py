"""Of a report, what became of the matrices, and why some gave more than others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, median
from typing import Any

from obsprune.report import pictures, said
from obsprune.report.grid import make_grid
from obsprune.report.parts import Cell, Facts, Figures, Marked, Part, Sentence, Table

Report = Mapping[str, Any]
WORST = 10
"""Matrices shown at once."""
MOST = 1000
"""Matrices in the table of all: mixtures of experts have tens of thousands."""
COLUMNS: dict[str, Callable[[Any], str]] = {
    "error": said.number,
    "sparsity": said.percent,
    "shape": lambda sides: " × ".join(f"{side:,}" for side in sides),
    "loss": said.number,
    "damping": said.number,
    "tokens": said.plain,
    "correction": said.number,
    "seconds": said.seconds,
    "dtype": str,
}
"""What a matrix may have beside its name, and how it is said."""
MEANING = (
    "Relative error: what is lost of a matrix's outputs on the calibration data, squared, as a share of them; after "
    "corrected targets, block matching and rounds it is not what the whole model loses.",
    "In the tables of matrices, loss is what is lost before it is a share of anything; correction is how far the "
    "matrix's target was moved toward the dense model's output, from 0, not at all, to 1, all the way; tokens are "
    "those of the calibration data (of images, patches or places) that it saw.",
)
"""Of what is told of matrices."""


def matrices(report: Report) -> Iterator[Part]:
    found: list[Report] = report["matrices"]
    yield Figures(pictures.matrices(report))
    yield Table("By kind", *_kinds(found))
    ranked = sorted(found, key=lambda matrix: -(matrix.get("error") or 0.0))
    has_errors = any("error" in matrix for matrix in found)
    if has_errors:
        yield from map(Sentence, MEANING)
        yield Table(f"The {min(WORST, len(found))} with the largest errors", *_listed(ranked[:WORST]))
    if len(found) <= MOST:
        yield Table(f"All {said.counted(len(found), 'matrix', 'matrices')}", *_listed(found), folded=True)
    elif has_errors:
        told = f"The {MOST:,} with the largest errors of {len(found):,}; report.json has all"
        yield Table(told, *_listed(ranked[:MOST]), folded=True)


def _kinds(found: Sequence[Report]) -> tuple[list[str], list[list[Cell]]]:
    """A row for all matrices that are called alike in their blocks."""
    zeros, errors = (
        {kind: cell for (kind, _), cell in make_grid(found, of).folded(1).cells.items()} for of in ("sparsity", "error")
    )
    rows: list[list[Cell]] = []
    for kind, cell in zeros.items():
        error = errors.get(kind)
        told = [said.number(error.value), said.number(error.most)] if error else []
        rows.append([kind, f"{cell.count:,}", said.percent(cell.value), *told])
    return ["kind", "matrices", "sparsity", *(["mean error", "largest error"] if errors else [])], rows


def _listed(found: Sequence[Report]) -> tuple[list[str], list[list[Cell]]]:
    shown = [name for name in COLUMNS if any(name in matrix for matrix in found)]
    rows: list[list[Cell]] = [
        [matrix["name"], *(COLUMNS[name](matrix[name]) if name in matrix else "" for name in shown)] for matrix in found
    ]
    return ["matrix", *shown], rows


def allocation(report: Report) -> Iterator[Part]:
    found = report.get("allocation")
    if not found:
        return
    tried = found["tried"]
    rows: list[list[Cell]] = [_tried(rule, score, rule == found["rule"]) for rule, score in tried.items()]
    if rows:
        yield Figures(pictures.allocation(report))
        yield Table("How zeros were shared out, judged on what was held out", ["rule", "KL", "loss"], rows)
    elif report["sparsity"]["pattern"] == "unstructured":
        yield Sentence("Every matrix gave the same share of zeros; no other way was tried.")


def _tried(rule: str, score: Report, chosen: bool) -> list[Cell]:
    told = [f"{rule} ★" if chosen else rule, said.score(score["heldout_kl"]), said.score(score["nll"])]
    return [Marked(cell) for cell in told] if chosen else [*told]


def experts(report: Report) -> Iterator[Part]:
    layers = report.get("coverage", [])
    if not layers:
        return
    yield Figures(pictures.coverage(report))
    head = ["experts of", "number", "fewest tokens", "in the middle", "most", "asked for", "saw fewer", "saw none"]
    yield Table("Calibration tokens that reached the experts", head, [_layer(layer) for layer in layers])
    if any(layer["starved"] for layer in layers):
        yield Sentence(f"Experts that fewer tokens reached than were asked for were {layers[0]['fate']}.")
    if any(layer["unseen"] for layer in layers):
        yield Sentence("Experts that no token reached were pruned by magnitude.")


def _layer(layer: Report) -> list[Cell]:
    tokens, starved, unseen = layer["tokens"], len(layer["starved"]), len(layer["unseen"])
    told = [len(tokens), min(tokens), median(tokens), max(tokens), layer["fewest"]]
    few: Cell = Marked(f"{starved:,}", "wrong") if starved else "0"
    none: Cell = Marked(f"{unseen:,}", "wrong") if unseen else "0"
    return [layer["layer"], *(f"{value:,.0f}" for value in told), few, none]


def matching(report: Report) -> Iterator[Part]:
    blocks = report.get("matching", [])
    if not blocks:
        return
    pairs = [(block["before"], block["after"]) for block in blocks]
    known = [pair for pair in pairs if all(map(said.is_finite, pair))]
    if known:
        before, after = map(mean, zip(*known, strict=True))
        told = f"The blocks' own error fell from {said.number(before)} to {said.number(after)} in the mean."
        yield Sentence(told)
    names = [name for name in blocks[0] if name != "block"]
    rows: list[list[Cell]] = [[block["block"], *(said.plain(block[name]) for name in names)] for block in blocks]
    yield Table("Block by block", ["block", *names], rows, folded=True)


def damping(report: Report) -> Iterator[Part]:
    """How much was added to the diagonals before they were factorised, and where it had to be more than asked."""
    used: dict[float, int] = {}
    for matrix in report["matrices"]:
        if matrix.get("damping") is not None:
            used[matrix["damping"]] = used.get(matrix["damping"], 0) + 1
    if not used:
        return
    asked = report["recipe"].get("solver", {}).get("damping")
    rows: list[tuple[str, Cell]] = [("asked", said.number(asked) if asked is not None else "none")]
    for value, count in sorted(used.items()):
        told = said.counted(count, "matrix", "matrices")
        rows.append((f"used: {said.number(value)}", Marked(told, "wrong") if value > (asked or 0.01) else told))
    yield Facts(rows)
