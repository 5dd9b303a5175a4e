"""A report as sections of a page: what was reached, what it cost, where it hurts, how to repeat it.

report.html and report.md are made of the same sections. Commands have different parts in their reports; a section
whose part is not there is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from obsprune.report import pictures, results, said, weights
from obsprune.report.card import LOST, WHO, method_of
from obsprune.report.parts import Code, Facts, Figures, Notes, Part, Section, Sentence, Tiles

Report = Mapping[str, Any]
COMMANDS = {"solver": "prune", "training": "train-prune", "tuning": "finetune"}
"""By the part that a command alone has in its recipe."""


def make_sections(report: Report) -> list[Section]:
    """All that a report has."""
    made = [Section(name, title, [*parts(report)]) for name, (title, parts) in STORY.items()]
    return [section for section in made if section.parts]


def lead(report: Report) -> str:
    """What was done, in a sentence."""
    sparsity, model = report["sparsity"], report["model"]
    done = {"prune": "pruned", "train-prune": "pruned and retrained", "finetune": "fine-tuned"}[command(report)]
    return (
        f"The {model['kind']} {model['source']}, {done} by obsprune {report['versions']['obsprune']} "
        f"({method_of(report)}): {sparsity['zeros']:,} of {sparsity['weights']:,} weights in "
        f"{said.counted(len(report['matrices']), 'matrix', 'matrices')} are zero."
    )


def command(report: Report) -> str:
    """Which one wrote the report."""
    return next(name for part, name in COMMANDS.items() if part in report["recipe"])


def summary(report: Report) -> Iterator[Part]:
    sparsity, seconds, memory = report["sparsity"], report["seconds"], report["memory"]
    pattern = sparsity["pattern"]
    yield Tiles(
        [
            ("sparsity", said.percent(sparsity["reached"]), f"asked {said.percent(sparsity['asked'])}, {pattern}"),
            *(_headline(task, scores) for task, scores in report["evaluation"].items()),
            *_packed(report),
            ("time", said.seconds(seconds["total"]), f"on {report['model']['device']}"),
            *((f"memory, {key.removesuffix('_bytes')}", said.size(value), "at most") for key, value in memory.items()),
        ]
    )
    base = report["model"].get("base")
    dense = Counter(report["skipped"].values())
    yield Facts(
        [
            ("model", report["model"]["source"]),
            *([("on the hub", f"{base['id']}, revision {base['revision']}")] if base else []),
            ("architecture", f"{report['model']['type']}, {report['model']['parameters']:,} parameters"),
            ("computed in", f"{report['model']['compute_dtype']} on {report['model']['device']}"),
            ("method", f"obsprune {command(report)}, {method_of(report)}"),
            ("left dense", "; ".join(f"{why}: {count}" for why, count in dense.items()) or "nothing"),
            ("result", report["output"]),
        ]
    )


def _headline(task: str, scores: Report) -> tuple[str, str, str]:
    who = [one for one in WHO if one in scores]
    metric = scores[who[0]]["metric"]
    values = " → ".join(said.number(scores[one][metric]) for one in who)
    return f"{metric}, {said.task(task)}", values, f"{' → '.join(who)}{_ratio(scores)}"


def _ratio(scores: Report) -> str:
    return f"; × {said.number(scores['ratio'])}" if "ratio" in scores else ""


def _packed(report: Report) -> Iterator[tuple[str, str, str]]:
    if packed := report.get("packed"):
        sizes = f"{said.size(packed['dense_bytes'])} → {said.size(packed['packed_bytes'])}"
        yield "size on disk", said.percent(packed["share"]), sizes


def cost(report: Report) -> Iterator[Part]:
    yield Figures(pictures.time(report))
    spent, memory, most = report["seconds"], report["memory"], report["peak_memory_bytes"]
    solving = sum(matrix.get("seconds") or 0.0 for matrix in report["matrices"])
    alone = "solvers alone, in the round that was kept" if report.get("rounds") else "of these, solvers alone"
    parts = [(name, said.seconds(spent[key])) for key, name in pictures.SPENT.items() if spent.get(key)]
    yield Facts(
        [
            ("this process, from start to report", said.seconds(spent["total"])),
            *parts,
            *([(alone, said.seconds(solving))] if solving else []),
            *((f"memory of its own, {key.removesuffix('_bytes')}", said.size(value)) for key, value in memory.items()),
            *((f"resident or allocated, {key}", said.size(value)) for key, value in most.items()),
        ]
    )
    if sum(spent[key] for key in pictures.SPENT if key in spent) > spent["total"]:
        yield Sentence(
            "The parts take longer than this process: they are summed over all processes that worked on the run, also "
            "before it was continued."
        )


def data(report: Report) -> Iterator[Part]:
    told = {key: value for key, value in report["data"].items() if key != "rounds"}
    rows = [(NAMES.get(key, key), said.plain(value)) for key, value in told.items() if value is not None]
    rounds = report["data"].get("rounds", {})
    if rounds:
        rows += [("different ones in all rounds", said.plain(rounds["seen"])),
                 ("sha256 of further rounds", said.plain(rounds["sha256"]))]  # fmt: skip
    yield Facts([*rows, ("seed", said.plain(report["recipe"]["seed"]))])


def notes(report: Report) -> Iterator[Part]:
    yield Notes(report["warnings"] or ["There were no warnings."])


def repeat(report: Report) -> Iterator[Part]:
    what = command(report)
    if report["command"]:
        yield Code("The command", report["command"])
    yield Code("The same, from the settings beside this report", f"obsprune {what} --config recipe.yaml -o DIRECTORY")
    settings = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
    yield Code("The recipe: every setting, as recipe.yaml has it", settings, "yaml", folded=True)
    yield Facts(list(report["versions"].items()))
    yield Sentence(
        "With the same seed, versions, data and kind of machine the result has the same bytes; elsewhere it differs by "
        "rounding."
    )


def purpose(report: Report) -> Iterator[Part]:
    yield Notes([report["good_for"], LOST])


NAMES = {
    "sha256": "sha256 of the samples",
    "heldout": "held out",
    "heldout_sha256": "sha256 of those held out",
    "trained": "trained on",
    "trained_sha256": "sha256 of those trained on",
    "size": "height and width",
}
"""Of facts about the data, where their own names say too little."""
STORY: dict[str, tuple[str, Callable[[Report], Iterator[Part]]]] = {
    "summary": ("Summary", summary),
    "scores": ("Scores", results.scores),
    "rounds": ("Rounds", results.rounds),
    "steps": ("Steps", results.steps),
    "matrices": ("Matrices", weights.matrices),
    "allocation": ("Allocation", weights.allocation),
    "experts": ("Experts", weights.experts),
    "matching": ("Block matching", weights.matching),
    "cost": ("Time and memory", cost),
    "damping": ("Damping", weights.damping),
    "notes": ("Warnings", notes),
    "data": ("Data", data),
    "repeat": ("How to repeat it", repeat),
    "purpose": ("What it is good for, and what not", purpose),
}
"""{name in the page's address: (title, what makes its parts)}, in the order of the page."""
