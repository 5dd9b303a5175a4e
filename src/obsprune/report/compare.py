"""Several runs beside one another, as plain values: what each came to, which may be compared, by how much they differ,
and what was asked of them differently.

Runs are comparable on a task when it was the same for both: material, length, stride, examples; and when they were made
of the same dense model. Others are shown beside them, with a note, and never tested.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from obsprune.engine.rundir import JOURNAL
from obsprune.evaluate.paired import paired
from obsprune.report.card import method_of
from obsprune.report.differences import Difference, differences
from obsprune.report.report import Report
from obsprune.report.runs import ASKED, Asked, Run, Tree, asked, whose
from obsprune.report.said import is_finite

SCHEMA = 1
LEVEL = 0.05
"""Below which p, after Holm's correction for the number of tests, a difference is called more than chance."""
ALIKE = 1e-3
"""Dense scores on the same material that are as near to each other as that are of one model, in one type or another."""
FALLING = re.compile(r"perplexity|nll|entropy|loss|bits_per_byte|brier|(^|_)(err|mse|ter|wer)$")
"""Metrics of which less is better."""
TOLD = ("corpus", "dataset", "sequences", "images", "questions", *ASKED[2:], "img_size", "sha256")
"""What says how a protocol differs, or what it was."""
DRAWN = "drawn from other data or with another seed, number or length of calibration sequences"
"""Why held-out material may be another where all that is told of it is alike."""


@dataclass(frozen=True)
class Score:
    """A run on a task. score: None where it is not finite; dense: of the model it was made of, where that is known;
    model: which one that is; best: it is finite, and no run of the same model is smaller and as good, or as small and
    better.
    """

    run: str
    score: float | None
    dense: float | None
    model: int
    left: int
    best: bool


@dataclass(frozen=True)
class Beside:
    """A run against the reference, item by item. quantity: of which difference, its standard error and p are (of
    perplexity, the loss); verdict: better or worse where that is more than chance, all tests of the task considered,
    `no difference` where it is not, or `no test`; refused: why there is none.
    """

    run: str
    quantity: str | None = None
    difference: float | None = None
    stderr: float | None = None
    p: float | None = None
    items: int | None = None
    verdict: str = "no test"
    refused: str | None = None


@dataclass(frozen=True)
class Contest:
    """Runs that were asked the same. falls: less is better; reference: the run that the others are held against."""

    task: str
    metric: str
    falls: bool
    protocol: Tree
    reference: str
    scores: list[Score]
    tests: list[Beside]


@dataclass(frozen=True)
class Comparison:
    """runs: facts of each; models: the dense ones; notes: what must not be compared, and why."""

    runs: list[Tree]
    models: list[str]
    contests: list[Contest]
    differences: list[Difference]
    notes: list[str]

    def tree(self) -> Tree:
        """As nested plain values."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def compare(runs: Sequence[Run]) -> Comparison:
    """The first run is the reference, wherever it was asked the same as others."""
    models = _models(runs)
    keys = list(dict.fromkeys(key for run in runs for key in run.scores))
    contests = [_contest(key, [run for run in runs if key in run.scores], models) for key in keys]
    sources = {models[run.name]: run.source for run in reversed(runs)}
    return Comparison(
        [_facts(run, models[run.name]) for run in runs],
        [sources[number] for number in sorted(sources)],
        contests,
        differences(runs),
        [*_notes_on_models(runs, models), *_notes_on_tasks(runs)],
    )


# ------------------------------------------------------------------------------------------- what is comparable


def _models(runs: Sequence[Run]) -> dict[str, int]:
    """{run: number of its dense model}; runs of equal models have the same."""
    first: list[Run] = []
    numbers = {}
    for run in runs:
        known = [number for number, other in enumerate(first) if _same_model(run, other)]
        numbers[run.name] = known[0] if known else len(first)
        first += [] if known else [run]
    return numbers


def _same_model(run: Run, other: Run) -> bool:
    """Dense scores on the same material say it; where there are none, names do."""
    if any(run.report["model"][key] != other.report["model"][key] for key in ("type", "kind", "parameters")):
        return False
    pairs = [(run.scores[key][1].get("dense"), other.scores[key][1].get("dense")) for key in _shared(run, other)]
    scores = [(_finite(a[a["metric"]]), _finite(b[b["metric"]])) for a, b in pairs if a and b]
    known = [(one, its) for one, its in scores if one is not None and its is not None]
    if known:
        return all(math.isclose(one, its, rel_tol=ALIKE) for one, its in known)
    return run.source == other.source


def _shared(run: Run, other: Run) -> list[Asked]:
    return [key for key in run.scores if key in other.scores]


def _notes_on_models(runs: Sequence[Run], models: Mapping[str, int]) -> Iterator[str]:
    for run in runs:
        if models[run.name] != models[runs[0].name]:
            (size, source), (first, its) = ((one.report["model"]["parameters"], one.source) for one in (run, runs[0]))
            yield (
                f"{run.name} is of another dense model ({source}, {size:,} numbers) than {runs[0].name} ({its}, "
                f"{first:,}): each can be judged beside its own dense model, not the two by a test"
            )


def _notes_on_tasks(runs: Sequence[Run]) -> Iterator[str]:
    """Of runs without scores, tasks of one name that were not the same, and scores that a run was chosen by."""
    first: dict[str, tuple[Run, Tree]] = {}
    for run in runs:
        if not run.scores:
            yield (
                f"{run.name} was not evaluated; obsprune eval {run.path} --task TASK prints its scores; a page needs a "
                "run that was pruned with --eval TASK"
            )
        for key, (task, pair) in run.scores.items():
            known, score = first.setdefault(task, (run, pair[whose(pair)]))
            if asked(score) != key:
                differs = _other(task, score, pair[whose(pair)])
                yield (
                    f"{task} was not the same for {known.name} and {run.name} ({differs}): these scores must not be "
                    f"compared; obsprune eval {run.path} --compare {known.path} --task TASK measures both alike and "
                    "prints their scores; a page needs runs that were pruned with --eval TASK"
                )
    chosen = [run.name for run in runs if "heldout" in run.report["evaluation"] and _chose(run.report)]
    if chosen and len(runs) > 1:
        kept = ", ".join(chosen)
        yield f"heldout also chose which weights were kept of {kept}, and flatters them; another text does not"


def _chose(report: Report) -> bool:
    """Whether held-out data decided between rounds, allocations or steps."""
    return bool(report.get("rounds") or report.get("allocation", {}).get("tried") or "tuning" in report)


def _other(task: str, score: Tree, other: Tree) -> str:
    told = [key for key in TOLD if score.get(key) != other.get(key)]
    said = [key for key in told if key != "sha256"] or ["sha256"]
    why = f"{DRAWN}: " if task == "heldout" and said == ["sha256"] else ""
    return why + ", ".join(f"{key} {_brief(score.get(key))} beside {_brief(other.get(key))}" for key in said)


def _brief(value: Any) -> str:
    return str(value)[:12]


# ------------------------------------------------------------------------------------------------ one task


def _contest(key: Asked, runs: Sequence[Run], models: Mapping[str, int]) -> Contest:
    task, pair = runs[0].scores[key]
    told, metric = pair[whose(pair)], str(key[0])
    falls = _falls(metric)
    scores = [_score(run, key, models[run.name]) for run in runs]
    tests = _corrected([_beside(run, runs[0], key, models) for run in runs[1:]])
    protocol = {name: told[name] for name in TOLD if told.get(name) is not None}
    return Contest(task, metric, falls, protocol, runs[0].name, _fronts(scores, falls), tests)


def _score(run: Run, key: Asked, model: int) -> Score:
    pair, metric = run.scores[key][1], key[0]
    dense, score = (pair[who][metric] if who in pair else None for who in ("dense", whose(pair)))
    return Score(run.name, _finite(score), _finite(dense), model, run.left, False)


def _finite(value: float | None) -> float | None:
    return value if is_finite(value) else None


def _fronts(scores: Sequence[Score], falls: bool) -> list[Score]:
    """With `best` set, model by model."""
    sign = 1 if falls else -1

    def cost(one: Score) -> tuple[int, float]:
        return one.left, math.inf if one.score is None else sign * one.score

    def beaten(one: Score, by: Score) -> bool:
        mine, its = cost(one), cost(by)
        return by.model == one.model and its != mine and its[0] <= mine[0] and its[1] <= mine[1]

    return [
        dataclasses.replace(one, best=one.score is not None and not any(beaten(one, by) for by in scores))
        for one in scores
    ]


def _beside(run: Run, reference: Run, key: Asked, models: Mapping[str, int]) -> Beside:
    if models[run.name] != models[reference.name]:
        return Beside(run.name, refused=f"of another dense model than {reference.name}")
    mine, its = run.items(key), reference.items(key)
    for one, items in ((run, mine), (reference, its)):
        if not items:
            why = "keeps none for this metric" if one.events else f"came without its {JOURNAL}"
            return Beside(run.name, refused=f"no scores of single items: {one.name} {why}")
        if not all(is_finite(value) for values in items.values() for value in values):
            return Beside(run.name, refused=f"not all scores of {one.name} are finite")
    tests = paired(mine, its)
    quantity = next((name for name in (key[0], *tests) if name in tests), None)
    if quantity is None:
        return Beside(run.name, refused="other items of the task could be read")
    return Beside(run.name, quantity, **tests[quantity])


def _corrected(tests: Sequence[Beside]) -> list[Beside]:
    """With their verdicts, by Holm (1979): the smallest p times the number of tests, the next one times one less, and
    so on, until one is not below LEVEL.
    """
    made = sorted((test for test in tests if test.p is not None), key=lambda test: test.p or 0.0)
    beyond = set()
    for index, test in enumerate(made):
        if (test.p or 0.0) * (len(made) - index) >= LEVEL:
            break
        beyond.add(test.run)
    return [dataclasses.replace(test, verdict=_verdict(test, test.run in beyond)) for test in tests]


def _verdict(test: Beside, beyond: bool) -> str:
    if test.quantity is None or test.difference is None:
        return test.verdict
    return ("better" if (test.difference < 0) == _falls(test.quantity) else "worse") if beyond else "no difference"


def _falls(metric: str) -> bool:
    """Whether less is better."""
    return FALLING.search(metric) is not None


# --------------------------------------------------------------------------------------------------- facts


def _facts(run: Run, model: int) -> Tree:
    report, sparsity = run.report, run.report["sparsity"]
    return {
        "name": run.name,
        "path": str(run.path),
        "model": model,
        "source": run.source,
        "method": method_of(report),
        "pattern": sparsity["pattern"],
        "sparsity": sparsity["reached"],
        "zeros": sparsity["zeros"],
        "parameters": report["model"]["parameters"],
        "left": run.left,
        "disk": run.disk,
        "packed": run.packed,
        "seconds": report["seconds"]["total"],
        "warnings": len(report["warnings"]),
    }
