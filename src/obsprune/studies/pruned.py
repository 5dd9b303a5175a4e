"""What came of pruning a checkpoint by several recipes: values, tables and figures from the reports of the runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from obsprune.report.figures import Curves, Figure, Line
from obsprune.report.report import Report
from obsprune.studies.base import Cell, Table, spread

SHOWN = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30, 40, 50, 60, 80, 100)
"""The rounds of a table; the figure has all of them."""


@dataclass(frozen=True)
class Case:
    """One cell of the experiment: a form of pruning, and a sparsity or n:m."""

    form: str
    pattern: float | str

    @property
    def name(self) -> str:
        return f"{self.form}.{self.pattern}"


Found = Mapping[Case, Sequence[Report]]
"""The reports of each case, one a seed."""


def short(task: str) -> str:
    """A task without its file: imagenet, text, wikitext2."""
    return task.partition("=")[0]


def scores(report: Report, who: str) -> dict[str, float]:
    """{task: its headline} of the dense or the pruned model."""
    return {short(task): pair[who][pair[who]["metric"]] for task, pair in report["evaluation"].items()}


def rounds(report: Report) -> dict[str, dict[int, float]]:
    """{task, or kl: {round: value}}: of each round's iterate, on what was evaluated, and its held-out divergence."""
    found: dict[str, dict[int, float]] = {}
    for entry in report["rounds"]:
        if entry["heldout_kl"] is not None:
            found.setdefault("kl", {})[entry["round"]] = entry["heldout_kl"]
        for task, score in entry.get("scores", {}).items():
            found.setdefault(short(task), {})[entry["round"]] = score[score["metric"]]
    return found


def _called(found: Found, what: str) -> str:
    """What a value is called under a table or beside an axis."""
    evaluation = next(iter(found.values()))[0]["evaluation"]
    metrics = {short(task): f"{pair['dense']['metric']}, {short(task)}" for task, pair in evaluation.items()}
    return {"kl": "held-out KL from the dense model, nats", **metrics}[what]


def best(report: Report) -> int:
    """The round that the result is of."""
    return next((entry["round"] for entry in report["rounds"] if entry["best"]), 1)


def values(found: Found) -> dict[str, float]:
    """By name, the mean over the seeds (studies/pruning.py)."""
    first = next(iter(found.values()))[0]
    told = {f"dense.{task}": score for task, score in scores(first, "dense").items()}
    for case, reports in found.items():
        told |= {
            f"{case.name}.{name}": value for name, value in _mean([_numbers(report) for report in reports]).items()
        }
    return told


def _numbers(report: Report) -> dict[str, float]:
    by_round = {f"{what}.round{n}": value for what, line in rounds(report).items() for n, value in line.items()}
    spent = {"seconds": sum(report["seconds"][part] for part in ("allocation", "pruning", "rounds"))}
    reached = {"sparsity": report["sparsity"]["reached"], "round": float(best(report))}
    return {**scores(report, "pruned"), **reached, **by_round, **spent}


def _mean(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what all of them say: rounds may end early."""
    return {name: mean(one[name] for one in told) for name in told[0] if all(name in one for one in told)}


def facts(report: Report) -> dict[str, str]:
    """On what was calibrated and evaluated, which is alike in all runs."""
    data = {key: value for key, value in report["data"].items() if isinstance(value, str | int | float)}
    protocols = {task: pair["dense"] for task, pair in report["evaluation"].items()}
    return {"data": json.dumps(data), **{f"evaluation, {task}": json.dumps(one) for task, one in protocols.items()}}


def tables(found: Found) -> list[Table]:
    """All results, and the rounds of those that have some."""
    told = [_results(found)]
    further = {case: reports for case, reports in found.items() if len(reports[0]["rounds"]) > 1}
    return told + [_by_round(further, what) for what in (rounds(next(iter(further.values()))[0]) if further else ())]


def _results(found: Found) -> Table:
    first = next(iter(found.values()))[0]
    dense = scores(first, "dense")
    columns = ["form", "pattern", *dense, "best round", "of", "seconds"]
    head: list[Cell] = ["dense", "", *dense.values(), "", "", ""]
    return Table("Results", columns, [head, *(_row(case, reports) for case, reports in found.items())])


def _row(case: Case, reports: Sequence[Report]) -> list[Cell]:
    every = [scores(report, "pruned") for report in reports]
    numbers = _mean([_numbers(report) for report in reports])
    last = max(len(report["rounds"]) for report in reports)
    spreads = [spread([one[task] for one in every]) for task in every[0]]
    return [case.form, str(case.pattern), *spreads, numbers["round"], max(last, 1), numbers["seconds"]]


def _by_round(found: Found, what: str) -> Table:
    """A row a round; the starred one is the result."""
    lines = {case: _mean_line([rounds(report)[what] for report in reports if what in rounds(report)])
             for case, reports in found.items()}  # fmt: skip
    stars = {case: best(reports[0]) if len(reports) == 1 else 0 for case, reports in found.items()}
    last = max(max(line, default=1) for line in lines.values())
    rows: list[list[Cell]] = [
        [n, *(_starred(lines[case], n, stars[case]) for case in lines)]
        for n in range(1, last + 1)
        if n in SHOWN or n == last or n in stars.values()
    ]
    return Table(f"{_called(found, what)}, by round", ["round", *(case.name for case in lines)], rows)


def _starred(line: Mapping[int, float], number: int, star: int) -> Cell:
    if number not in line:
        return ""
    return f"{line[number]:.4g} *" if number == star else line[number]


def _mean_line(lines: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Over seeds, as far as all of them go."""
    return {n: mean(line[n] for line in lines) for n in (lines[0] if lines else ()) if all(n in line for line in lines)}


def figures(model: str, found: Found) -> list[Figure]:
    """Scores by round, the best iterate starred: the paper's figure; a panel for each task and pattern."""
    further = {case: reports for case, reports in found.items() if len(reports[0]["rounds"]) > 1}
    if not further:
        return []
    kinds = list(rounds(next(iter(further.values()))[0]))
    patterns = list(dict.fromkeys(case.pattern for case in further))
    return [Figure(f"rounds-{what}", [_panel(model, further, what, pattern) for pattern in patterns]) for what in kinds]


def _panel(model: str, found: Found, what: str, pattern: float | str) -> Curves:
    told: Callable[[Report], dict[int, float]] = lambda report: rounds(report).get(what, {})  # noqa: E731
    lines = {
        case.form: _line(_mean_line([told(report) for report in reports]), best(reports[0]))
        for case, reports in found.items()
        if case.pattern == pattern and all(map(told, reports))
    }
    return Curves(f"{model}, {pattern}", "round", _called(found, what), lines, log_y=what == "kl")


def _line(by_round: Mapping[int, float], star: int) -> Line:
    numbers = list(by_round)
    return Line(numbers, list(by_round.values()), star=numbers.index(star) if star in by_round else None)
