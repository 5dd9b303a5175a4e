"""Of a report, what was measured: scores, and what rounds and steps came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from obsprune.report import pictures, said
from obsprune.report.card import WHO
from obsprune.report.parts import Cell, Facts, Figures, Marked, Part, Sentence, Table

Report = Mapping[str, Any]
LONG = 20
"""Rows of a table that is not folded."""


def scores(report: Report) -> Iterator[Part]:
    evaluation = report["evaluation"]
    if not evaluation:
        yield Sentence("The result was not evaluated.")
        return
    who = [one for one in WHO if any(one in scores for scores in evaluation.values())]
    rows = [row for task, scores in evaluation.items() for row in _score_rows(task, scores, who)]
    yield Table("Dense and sparse", ["task", "metric", *who, "change", "p", "measured on"], rows, left=2)
    yield Sentence(
        f"Change: {who[-1]} against {who[-2]}. p: how probable a difference as large is by chance, document by "
        "document, image by image or question by question."
    )
    yield from _parts_of(evaluation, who)
    protocol = [row for task, scores in evaluation.items() for row in _protocol(task, scores)]
    yield Table("How it was measured", ["task", "what", "value"], protocol, left=3, folded=True)


def _score_rows(task: str, scores: Report, who: list[str]) -> Iterator[list[Cell]]:
    known = [one for one in who if one in scores]
    first, last = scores[known[-2]] if len(known) > 1 else scores[known[-1]], scores[known[-1]]
    for metric in said.metrics(last):
        if metric in first:
            told = [said.score(scores[one][metric]) if one in scores else "" for one in who]
            change, p = _change(metric, last, first, scores)
            yield [said.task(task), metric, *told, change, p, said.measured_on(last)]


def _change(metric: str, last: Report, first: Report, scores: Report) -> tuple[str, str]:
    """How much one score differs from another, and how probable that is by chance."""
    tests = scores.get("paired", {})
    test = tests.get("nll" if metric == "perplexity" else metric)
    p = said.probability(test["p"]) if test and said.is_finite(test["p"]) else ""
    if metric == "perplexity" and "ratio" in scores:
        return f"× {said.score(scores['ratio'])}", p
    if not said.is_finite(last[metric]) or not said.is_finite(first[metric]):
        return "", ""
    spread = f" ± {test['stderr']:.2g}" if test and said.is_finite(test["stderr"]) else ""
    return f"{last[metric] - first[metric]:+.4f}{spread}", p


def _parts_of(evaluation: Report, who: list[str]) -> Iterator[Part]:
    """Scores by group and by subject, where a task has them."""
    for task, scores in evaluation.items():
        known = [one for one in who if one in scores]
        metric = scores[known[-1]]["metric"]
        for kind in ("groups", "subjects"):
            parts = scores[known[-1]].get(kind, {})
            rows = [
                [name, *(said.score(scores[one][kind][name][metric]) for one in known), said.plain(part["questions"])]
                for name, part in parts.items()
            ]
            if rows:
                yield Table(f"{said.task(task)}, {metric} by {kind}", ["", *known, "questions"], rows, folded=True)


def _protocol(task: str, scores: Report) -> Iterator[list[Cell]]:
    one = next(scores[who] for who in WHO if who in scores)
    measured = {"metric", *said.metrics(one), *said.SPEED}
    for key, value in one.items():
        if (
            key not in measured
            and not key.endswith(said.DERIVED)
            and isinstance(value, str | int | float)
            and value != ""
        ):
            yield [said.task(task), key, said.plain(value)]


def rounds(report: Report) -> Iterator[Part]:
    entries = report.get("rounds", [])
    if not entries:
        return
    yield Figures(pictures.rounds(report))
    names, tasks = list(entries[0]["told"]), list(entries[0].get("scores", {}))
    head = ["round", "held-out KL", *names, *map(said.task, tasks), "step", "rate", "mask moved", "samples", "time"]
    yield Table("What each round came to; the best one is kept", head, [_round(entry, tasks) for entry in entries])


def _round(entry: Report, tasks: list[str]) -> list[Cell]:
    scores = [entry.get("scores", {}).get(task) for task in tasks]
    told = [
        said.score(entry["heldout_kl"]),
        *map(said.score, entry["told"].values()),
        *(said.score(score[score["metric"]]) if score else "" for score in scores),
        said.number(entry["step"]) if "step" in entry else "",
        said.number(entry["rate"]) if entry.get("rate") else "",
        said.percent(entry["moved"]) if "moved" in entry else "",
        "new" if entry["fresh"] else "reshuffled",
        said.seconds(entry["seconds"]),
    ]
    number = f"{entry['round']} ★" if entry["best"] else str(entry["round"])
    return [Marked(cell) for cell in [number, *told]] if entry["best"] else [number, *told]


def steps(report: Report) -> Iterator[Part]:
    entries = report.get("steps", [])
    if not entries:
        return
    yield Figures(pictures.steps(report))
    part = report.get("training") or report["tuning"]
    told = {key: value for key, value in part.items() if isinstance(value, str | int | float) and value != ""}
    yield Facts([(key.replace("_", " "), said.plain(value)) for key, value in told.items()])
    keys = {"sparsity": said.score, "loss": said.score, "heldout": said.score, "seconds": said.seconds}
    shown = {key: form for key, form in keys.items() if any(entry.get(key) is not None for entry in entries)}
    rows = [
        [said.plain(e["number"]), *(form(e[key]) if e.get(key) is not None else "" for key, form in shown.items())]
        for e in entries
    ]
    best = part.get("best")
    marked = [
        [Marked(cell) for cell in row] if best is not None and entry["number"] == best else row
        for entry, row in zip(entries, rows, strict=True)
    ]
    names = {"loss": "training loss", "heldout": "held-out loss", "seconds": "time"}
    yield Table("What each step came to", ["step", *(names.get(key, key) for key in shown)], marked,
                folded=len(rows) > LONG)  # fmt: skip
