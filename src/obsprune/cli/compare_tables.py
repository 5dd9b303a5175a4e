"""A comparison of runs as tables for the terminal: the first names the runs, the others call them by their letters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obsprune.cli.console import safe
from obsprune.cli.tables import add_row, new_table, seconds

if TYPE_CHECKING:
    from rich.table import Table

    from obsprune.report.compare import Beside, Comparison, Contest


def compare_tables(found: Comparison) -> list[Table]:
    """The runs, their sizes, a table a task, what differs, and what must not be compared."""
    from obsprune.report.compare_page import lettered

    letters = lettered(found)
    shared = [contest for contest in found.contests if len(contest.scores) > 1]
    alone = [contest for contest in found.contests if len(contest.scores) == 1]
    contests = [_contest(contest, letters) for contest in shared]
    further = [_alone(alone, letters)] if alone else []
    notes = [_notes(found)] if found.notes else []
    return [_runs(found, letters), _sizes(found, letters), *contests, *further, _differences(found, letters), *notes]


def _runs(found: Comparison, letters: dict[str, str]) -> Table:
    table = new_table("runs", ["", "run", "dense model", "method"], left=4)
    for run in found.runs:
        add_row(table, letters[run["name"]], *(run[key] for key in ("name", "source", "method")))
    return table


def _sizes(found: Comparison, letters: dict[str, str]) -> Table:
    from obsprune.report.compare_page import size

    table = new_table("what they came to", ["", "pattern", "sparsity", "not zero", "on disk", "time"], left=2)
    for run in found.runs:
        told = [letters[run["name"]], run["pattern"], f"{run['sparsity']:.4f}", f"{run['left']:,}"]
        add_row(table, *told, size(run), seconds(run["seconds"]))
    return table


def _contest(contest: Contest, letters: dict[str, str]) -> Table:
    from obsprune.report import said
    from obsprune.report.compare_page import change

    tests = {test.run: _tested(test) for test in contest.tests}
    title = safe(f"{said.task(contest.task)}: {contest.metric}, {'less' if contest.falls else 'more'} is better")
    table = new_table(title, ["", "score", "from dense", "front", f"beside {letters[contest.reference]}", "p", ""])
    for score in contest.scores:
        told = tests.get(score.run, ("", "", ""))
        front = "*" if score.best else ""
        add_row(table, letters[score.run], said.score(score.score), change(score, contest), front, *told)
    return table


def _tested(test: Beside) -> tuple[str, str, str]:
    from obsprune.report.compare_page import differing

    difference, p = differing(test)
    return f"{difference} {test.quantity or ''}", p, f"{test.verdict}: {test.refused}" if test.refused else test.verdict


def _alone(contests: list[Contest], letters: dict[str, str]) -> Table:
    from obsprune.report import said
    from obsprune.report.compare_page import change

    table = new_table("scores that no other run has", ["", "task", "metric", "score", "from dense"], left=3)
    for contest in contests:
        for score in contest.scores:
            told = [said.task(contest.task), contest.metric, said.score(score.score), change(score, contest)]
            add_row(table, letters[score.run], *told)
    return table


def _differences(found: Comparison, letters: dict[str, str]) -> Table:
    from obsprune.report.compare_page import setting

    table = new_table("what differs", ["", *letters.values()], left=1 + len(letters))
    for one in found.differences:
        values = (setting(one, name) for name in letters)
        add_row(table, one.key if one.part == "recipe" else f"{one.part} {one.key}", *values)
    return table


def _notes(found: Comparison) -> Table:
    table = new_table("caution", [""])
    for note in found.notes:
        add_row(table, note)
    return table
