"""The drawings of a report: what happened round by round, where the error is, where the time went."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from obsprune.report import said
from obsprune.report.drawings import (
    Bar,
    Bars,
    Chart,
    Drawing,
    Interval,
    Intervals,
    Point,
    Series,
)
from obsprune.report.grid import Cell, Grid, depths_of, make_grid
from obsprune.report.heatmap import HeatCell, HeatMap

Report = Mapping[str, Any]
LEAST = {"sparsity": 0.01, "error": 0.0}
"""The smallest range that colours are stretched over: shares that differ by rounding alone look alike."""
RATIO = 20.0
"""From which ratio of values on colours stand for ratios."""
SPENT = {
    "allocation": "allocation",
    "pruning": "pruning",
    "rounds": "further rounds",
    "steps": "steps",
    "evaluation": "evaluation",
}
"""The parts of a run's time, and how they are called."""
JUDGED = "held-out KL"


def rounds(report: Report) -> list[Drawing]:
    """Each thing that was judged after every round, the best round with a star: the figure of the paper."""
    entries = report["rounds"]
    drawn = [_over_rounds(entries, JUDGED, [entry["heldout_kl"] for entry in entries], {})]
    for name in entries[0]["told"] if entries else ():
        values = [entry["told"][name] for entry in entries]
        drawn.append(_over_rounds(entries, name, values, _dense_heldout(report, name)))
    for task in entries[0].get("scores", {}) if entries else ():
        scores = [entry.get("scores", {}).get(task) for entry in entries]
        metric = scores[0]["metric"]
        known = report["evaluation"].get(task, {}).get("dense")
        levels = {"dense": known[metric]} if known and said.is_finite(known[metric]) else {}
        values = [score[metric] if score else None for score in scores]
        drawn.append(_over_rounds(entries, f"{metric}, {said.task(task)}", values, levels))
    return [one for one in drawn if one is not None]


def _over_rounds(
    entries: Sequence[Report], name: str, values: Sequence[float | None], levels: Mapping[str, float]
) -> Drawing | None:
    points = [
        Point(entry["round"], value, f"round {entry['round']}: {said.score(value)}", star=entry["best"])
        for entry, value in zip(entries, values, strict=True)
        if said.is_finite(value)
    ]
    if not points:
        return None
    best = next((f", the best {point.label}" for point in points if point.star), "")
    told = "; ".join(point.label for point in points)
    return Chart(
        name=f"rounds-{_slug(name)}",
        title=f"{name[0].upper()}{name[1:]} by round; ★ the best, which is kept",
        tells=f"{name} on what was held out, {told}{best}.",
        x="round",
        y=name,
        series=[Series(name, points)],
        levels=levels,
        whole=True,
    )


def _slug(name: str) -> str:
    """Letters and digits alone, for an address in the page."""
    return "".join(char if char.isascii() and char.isalnum() else "-" for char in name.lower())


def _dense_heldout(report: Report, name: str) -> dict[str, float]:
    """The dense model's value on the samples that judge rounds, where it was measured."""
    for pair in report["evaluation"].values():
        dense = pair.get("dense", {})
        if dense.get("sha256") == report["data"]["heldout_sha256"] and said.is_finite(dense.get(name)):
            return {"dense": dense[name]}
    return {}


def steps(report: Report) -> list[Drawing]:
    """What was seen at the steps of a training: losses, and the sparsity where it grew."""
    entries, best = report["steps"], report.get("tuning", {}).get("best")
    lines = {"held-out loss": "heldout", "training loss": "loss", "sparsity": "sparsity"}
    return [
        _over_steps(entries, name, key, best if key == "heldout" else None)
        for name, key in lines.items()
        if any(said.is_finite(entry.get(key)) for entry in entries)
    ]


def _over_steps(entries: Sequence[Report], name: str, key: str, best: int | None) -> Drawing:
    points = [
        Point(e["number"], e[key], f"step {e['number']}: {said.score(e[key])}", star=e["number"] == best)
        for e in entries
        if said.is_finite(e.get(key))
    ]
    starred = "; ★ the best, which is kept" if best is not None else ""
    return Chart(
        name=f"steps-{key}",
        title=f"{name[0].upper()}{name[1:]} by step{starred}",
        tells=f"{name}, {'; '.join(point.label for point in points)}.",
        x="step",
        y=name,
        series=[Series(name, points)],
        whole=True,
    )


def matrices(report: Report) -> list[Drawing]:
    """Sparsity and relative error over depth and kind; experts of a layer are one place."""
    names = {"sparsity": "Sparsity", "error": "Relative error"}
    return [_heat(make_grid(report["matrices"], of), of, title) for of, title in names.items() if _known(report, of)]


def _known(report: Report, of: str) -> bool:
    return any(matrix.get(of) is not None for matrix in report["matrices"])


def _heat(grid: Grid, of: str, title: str) -> HeatMap:
    """The longer side is drawn downward, where pages have room."""
    tall = len(grid.depths) >= len(grid.kinds)
    rows, columns = (grid.depths, grid.kinds) if tall else (grid.kinds, grid.depths)
    row_of, column_of = ({name: place for place, name in enumerate(names)} for names in (rows, columns))
    cells = []
    for (kind, depth), cell in grid.cells.items():
        row, column = (depth, kind) if tall else (kind, depth)
        text = f"{100 * cell.value:.1f}" if of == "sparsity" else f"{cell.value:.2g}"
        cells.append(HeatCell(row_of[row], column_of[column], cell.value, text, _told(cell, of)))
    values = [cell.value for cell in grid.cells.values() if cell.value > 0]
    log = of == "error" and bool(values) and max(values) > RATIO * min(values)
    scale = ", colours by ratio" if log else ""
    return HeatMap(
        name=f"heat-{of}",
        title=f"{title} of each matrix" + (", in percent" if of == "sparsity" else ""),
        tells=f"{title} over {len(grid.depths)} depths and {len(grid.kinds)} kinds of matrices, {_range(values)}. The "
        "tables below have the numbers.",
        rows=rows,
        columns=columns,
        cells=cells,
        corner="depth" if tall else "kind",
        unit=f"{title.lower()}{scale}; a darker place is higher",
        least=LEAST[of],
        log=log,
    )


def _range(values: Sequence[float]) -> str:
    return f"from {said.number(min(values))} to {said.number(max(values))}" if values else "all of them zero"


def _told(cell: Cell, of: str) -> str:
    if cell.count == 1:
        return f"{cell.which}: {of} {said.number(cell.value)}"
    return f"{cell.count} matrices: {of} {said.number(cell.value)}; most {said.number(cell.most)} in {cell.which}"


def time(report: Report) -> list[Drawing]:
    """The parts of a run, longest first."""
    parts = [(name, report["seconds"][key]) for key, name in SPENT.items() if report["seconds"].get(key)]
    rest = report["seconds"]["total"] - sum(value for _, value in parts)
    if rest > 0:
        parts.append(("all else: loading, checks, writing", rest))
    parts.sort(key=lambda part: -part[1])
    bars = [Bar(name, value, said.seconds(value)) for name, value in parts]
    return [Bars("time-spent", "Where the time went", _listed(parts), bars)] if bars else []


def _listed(parts: Iterable[tuple[str, float]]) -> str:
    return "; ".join(f"{name}: {said.seconds(value)}" for name, value in parts) + "."


def allocation(report: Report) -> list[Drawing]:
    """The share of zeros over depth, where it is not the same everywhere."""
    if report["allocation"]["rule"] == "uniform":
        return []
    zeros, weights = Counter[str](), Counter[str]()
    for matrix in report["matrices"]:
        zeros[matrix["block"]] += matrix["zeros"]
        weights[matrix["block"]] += math.prod(matrix["shape"])
    shares = {block: zeros[block] / weights[block] for block in weights}
    points = [Point(i, share, f"{block}: {said.percent(share)}") for i, (block, share) in enumerate(shares.items())]
    levels = {"all": report["sparsity"]["reached"]}
    told = "; ".join(point.label for point in points)
    return [Chart("allocation-depth", "Sparsity over depth", f"{told}.", "block", "sparsity",
                  [Series("sparsity", points)], levels=levels, whole=True)]  # fmt: skip


def coverage(report: Report) -> list[Drawing]:
    """How many tokens the experts of each layer saw."""
    layers = report.get("coverage", [])
    intervals: list[Interval] = []
    depths = depths_of(layer["layer"] for layer in layers)
    for layer in layers:
        tokens = sorted(layer["tokens"])
        low, middle, high = tokens[0], tokens[len(tokens) // 2], tokens[-1]
        told = f"{layer['layer']}: {low:,} to {high:,} tokens, {middle:,} in the middle"
        intervals.append(Interval(depths[layer["layer"]], low, middle, high, told, marked=bool(layer["starved"])))
    if not intervals:
        return []
    fewest = max(layer["fewest"] for layer in layers)
    title = "Calibration tokens of the experts: fewest, middle, most"
    told = "; ".join(interval.label for interval in intervals)
    return [Intervals("experts-tokens", title, f"{told}.", intervals, "tokens", ("asked for", fewest))]
