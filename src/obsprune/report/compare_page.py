"""A comparison of runs as a page: what must not be compared, a table, a picture and tests a task, and differences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from obsprune.report import said
from obsprune.report.compare import Beside, Comparison, Contest, Score
from obsprune.report.differences import Difference
from obsprune.report.drawings import Chart, Point, Series
from obsprune.report.page import render
from obsprune.report.parts import Cell, Facts, Figures, Marked, Notes, Part, Section, Sentence, Table
from obsprune.report.pathless import pathless

UNITS = {1e9: "billions", 1e6: "millions", 1e3: "thousands", 1.0: "numbers"}
"""In which many numbers are counted."""
LONGEST = 18
"""Letters of a model's name in a picture."""
HASH = re.compile(r"[0-9a-f]{40,}")
EMPTY = {"evaluation": "default"}
"""What no entries in a list mean, where it is not that there are none."""
MEANING = (
    (
        "size",
        "The numbers of the model that are not zero. Files of dense results are as large as the dense model, whatever "
        "is zero in them; obsprune pack makes them smaller, and “on disk” says how large they are now.",
    ),
    (
        "front",
        "The runs that no other one of the same dense model beats: none is smaller and as good, or as small and "
        "better. The line through them ends at the dense model.",
    ),
    (
        "tests",
        "Item by item (sequences, questions, images), each run against the first one. p: how often a difference as "
        "large would come about if the two were alike. Better or worse is said where p stays under 0.05 after Holm's "
        "correction for the number of runs. Another draw of calibration data can move a score by more than that.",
    ),
)


def make_page(comparison: Comparison) -> str:
    """As HTML."""
    names = [run["name"] for run in comparison.runs]
    lead = f"{', '.join(names[:-1])} and {names[-1]}; {names[0]} is what the others are held against."
    return render(f"{len(names)} runs compared", lead, sections(comparison))


def sections(comparison: Comparison) -> list[Section]:
    """What the page says, in its order."""
    shared = [contest for contest in comparison.contests if len(contest.scores) > 1]
    alone = [contest for contest in comparison.contests if len(contest.scores) == 1]
    letters = lettered(comparison)
    return [
        Section("caution", "Caution", [Notes(comparison.notes)] if comparison.notes else []),
        Section("runs", "The runs", [_runs(comparison, letters)]),
        *(
            Section(f"task-{place}", said.task(contest.task), list(_task(contest, comparison, letters, place)))
            for place, contest in enumerate(shared)
        ),
        Section("alone", "Scores that no other run has", [_alone(alone, letters)] if alone else []),
        Section("differences", "What is different", list(_differing(comparison))),
        Section("reading", "How to read this", [Facts(MEANING)]),
    ]


def lettered(comparison: Comparison) -> dict[str, str]:
    """{run: what it is called in pictures}."""
    return {run["name"]: _letters(place) for place, run in enumerate(comparison.runs)}


def _letters(place: int) -> str:
    """A … Z, then AA, AB …"""
    return (_letters(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)


def _runs(comparison: Comparison, letters: dict[str, str]) -> Table:
    head = ["", "run", "dense model", "method", "pattern", "sparsity", "not zero", "on disk", "time"]
    rows = [
        [
            letters[run["name"]],
            run["name"],
            _model(run, comparison),
            run["method"],
            run["pattern"],
            f"{run['sparsity']:.4f}",
            f"{run['left']:,}",
            size(run),
            said.seconds(run["seconds"]),
        ]
        for run in comparison.runs
    ]
    return Table("what each run came to", head, rows, left=5)


def _model(run: dict[str, Any], comparison: Comparison) -> Cell:
    other = run["model"] != comparison.runs[0]["model"]
    return Marked(run["source"], "wrong") if other else run["source"]


def size(run: dict[str, Any]) -> str:
    """Of the weights' files."""
    if run["disk"] is None:
        return "not here"
    return f"{said.size(run['disk'])}{' packed' if run['packed'] else ''}"


def _task(contest: Contest, comparison: Comparison, letters: dict[str, str], place: int) -> Iterator[Part]:
    yield Sentence(f"Measured alike on all: {protocol(contest)}.")
    yield Figures([pareto(contest, comparison, letters, f"pareto-{place}")])
    yield _scores(contest, letters)
    refused = {f"{letters[test.run]} is not tested: {test.refused}" for test in contest.tests if test.refused}
    if refused:
        yield Notes(sorted(refused))


def protocol(contest: Contest) -> str:
    """In a line."""
    return ", ".join(f"{key.replace('_', ' ')} {pathless(spelt(value))}" for key, value in contest.protocol.items())


def pareto(contest: Contest, comparison: Comparison, letters: dict[str, str], name: str) -> Chart:
    """Size against score: a line for the front of each dense model, other runs as points of their own."""
    unit = next(unit for unit in UNITS if max(run["parameters"] for run in comparison.runs) >= unit or unit == 1.0)
    series = []
    for number, source in enumerate(comparison.models):
        mine = sorted((score for score in contest.scores if score.model == number), key=lambda score: score.left)
        front = [_point(score, letters, unit) for score in mine if score.best]
        others = [_point(score, letters, unit) for score in mine if not score.best]
        series.append(Series(f"{source}: the front", [*filter(None, front), *_dense(mine, comparison, unit)]))
        series.append(Series(f"{source}: others", [*filter(None, others)], joined=False))
    said_of = (f"{letters[s.run]} {s.run}: {s.left:,} numbers, {said.number(s.score)}" for s in contest.scores)
    return Chart(
        name,
        f"{contest.metric} against size; {'lower' if contest.falls else 'higher'} is better",
        "; ".join(said_of),
        f"numbers that are not zero, {UNITS[unit]}",
        contest.metric,
        [one for one in series if one.points],
    )


def _point(score: Score, letters: dict[str, str], unit: float) -> Point | None:
    """None without a finite score."""
    return None if score.score is None else Point(score.left / unit, score.score, letters[score.run], shown=True)


def _dense(scores: Sequence[Score], comparison: Comparison, unit: float) -> Iterator[Point]:
    """The dense model of these runs, where its score is known."""
    known = next((score for score in scores if score.dense is not None), None)
    if known is not None and known.dense is not None:
        run = next(run for run in comparison.runs if run["name"] == known.run)
        label = f"{run['source'][:LONGEST]}, dense" if len(comparison.models) > 1 else "dense"
        yield Point(run["parameters"] / unit, known.dense, label, shown=True)


def _scores(contest: Contest, letters: dict[str, str]) -> Table:
    tests = {test.run: test for test in contest.tests}
    quantity = next((test.quantity for test in contest.tests if test.quantity), contest.metric)
    alike = [one.score for one in contest.scores if one.model == contest.scores[0].model and one.score is not None]
    best = (min if contest.falls else max)(alike, default=None)
    head = ["", "run", contest.metric, f"beside {letters[contest.reference]}", f"difference of {quantity}", "p"]
    rows = [
        [
            letters[one.run],
            one.run,
            Marked(said.score(one.score)) if one.score is not None and one.score == best else said.score(one.score),
            *_tested(tests.get(one.run)),
            "" if one.dense is None else said.score(one.dense),
            change(one, contest),
            "yes" if one.best else "",
        ]
        for one in contest.scores
    ]
    return Table("scores, and each run beside the first one", [*head, "dense", "change", "front"], rows, left=2)


def change(score: Score, contest: Contest) -> str:
    """Of the dense model's score by pruning: perplexities as a ratio."""
    if score.dense is None or score.score is None:
        return ""
    if "perplexity" in contest.metric and score.dense:
        return f"× {score.score / score.dense:.3f}"
    return f"{score.score - score.dense:+.3f}"


def _tested(test: Beside | None) -> list[Cell]:
    if test is None:
        return ["reference", "", ""]
    mark = {"better": "best", "worse": "wrong"}.get(test.verdict)
    return [Marked(test.verdict, mark) if mark else test.verdict, *differing(test)]


def differing(test: Beside) -> tuple[str, str]:
    """Difference with its standard error, and p."""
    if test.difference is None:
        return "", ""
    return f"{test.difference:+.4f} ± {test.stderr:.2g}", said.probability(test.p or 0.0)


def _alone(contests: Sequence[Contest], letters: dict[str, str]) -> Table:
    rows = []
    for contest in contests:
        (score,) = contest.scores
        told = [said.task(contest.task), contest.metric, said.score(score.score), change(score, contest)]
        rows.append([letters[score.run], score.run, *told, protocol(contest)])
    head = ["", "run", "task", "metric", "score", "change", "measured on"]
    return Table("measured on something else than the others", head, rows, left=len(head))


def _differing(comparison: Comparison) -> Iterator[Part]:
    names = [run["name"] for run in comparison.runs]
    for part in dict.fromkeys(difference.part for difference in comparison.differences):
        rows = [_row(one, names) for one in comparison.differences if one.part == part]
        yield Table(f"{part}: marked is what is not as in {names[0]}", [part, *names], rows, left=len(names) + 1)
    if not comparison.differences:
        yield Sentence("Nothing: recipes, data, machine and versions are the same.")


def _row(difference: Difference, names: Sequence[str]) -> list[Cell]:
    values = {name: setting(difference, name) for name in names}
    return [difference.key, *(Marked(v, "differs") if v != values[names[0]] else v for v in values.values())]


def setting(difference: Difference, run: str) -> str:
    """What a run has there; of lists some stand for something where they are empty."""
    if run not in difference.values:
        return "–"
    value = difference.values[run]
    return EMPTY.get(difference.key, "none") if value == [] else spelt(value)


def spelt(value: Any) -> str:
    """A setting in a table: hashes by their beginning."""
    if isinstance(value, list | tuple):
        return ", ".join(map(spelt, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    text = {None: "none", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    return text or HASH.sub(lambda found: found[0][:12], str(value))
