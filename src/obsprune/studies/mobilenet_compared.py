"""Methods beside each other on the same images: values, tables and a figure of the study of I-OBS on MobileNetV1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from obsprune.evaluate.paired import paired
from obsprune.report.figures import Curves, Figure, Line
from obsprune.report.report import Report
from obsprune.studies import mobilenet
from obsprune.studies.base import Cell, Table
from obsprune.studies.mobilenet import Score

ROUNDS = ("iobs", "iobs-tuned")
"""The forms of I-OBS."""
AGAINST = ("cbs", "woodfisher", "sparsegpt")
"""What they are compared with, image by image."""
NORMS = {"": False, ".norms": True}
"""What follows a method's name, and whether the batch norms have new statistics."""
TOLD = {"": "norms as they were", ".norms": "new statistics of the norms"}
Found = dict[str, dict[float, Score]]
"""By method, with `.norms` where the statistics are new, and by sparsity; the dense model's at 0."""
Rounds = Mapping[str, Mapping[float, Sequence[Report]]]


def values(found: Found) -> dict[str, float]:
    """Accuracies and losses by name, and the differences with their standard errors."""
    ahead = {
        f"{form}-{other}{suffix}{what}.{sparsity:g}": one[key]
        for suffix in NORMS
        for form, other in pairs(found)
        for sparsity, one in differences(found, form + suffix, other + suffix).items()
        for what, key in (("", "difference"), (".stderr", "stderr"), (".p", "p"))
    }
    return mobilenet.values(found) | ahead


def pairs(found: Found) -> list[tuple[str, str]]:
    """Each form of I-OBS with each it is compared with, as far as they were run."""
    return [pair for pair in product(ROUNDS, AGAINST) if found.keys() >= set(pair)]


def differences(found: Found, name: str, other: str) -> dict[float, dict[str, Any]]:
    """By sparsity: how far one is ahead of the other in top-1, its standard error, and p (evaluate/paired.py)."""
    return {
        sparsity: paired(_items(one), _items(found[other][sparsity]))["top1"] for sparsity, one in found[name].items()
    }


def _items(score: Score) -> dict[str, list[float]]:
    return {"top1": [100.0 * right for right in score.right_N.tolist()]}


def with_norms(found: Found, suffix: str) -> Found:
    """The dense model and the methods with these norms, without the suffix."""
    return {"dense": found["dense"]} | {
        name.removesuffix(".norms"): by
        for name, by in found.items()
        if name != "dense" and name.endswith(".norms") == NORMS[suffix]
    }


def tables(found: Found, rounds: Rounds) -> list[Table]:
    """Top-1 and cross-entropy with both kinds of norms, the differences, and what became of the rounds."""
    plain = [
        replace(table, title=f"{table.title}; {told}")
        for suffix, told in TOLD.items()
        for table in (mobilenet.tables(with_norms(found, suffix), what) for what in ("top1", "loss"))
    ]
    return [*plain, *([_ahead(found), _told(rounds)] if rounds else [])]


def _ahead(found: Found) -> Table:
    rows: list[list[Cell]] = [
        [f"{form} − {other}", told, *map(_difference, differences(found, form + suffix, other + suffix).values())]
        for suffix, told in TOLD.items()
        for form, other in pairs(found)
    ]
    columns = ["", "", *_percent(found[AGAINST[0]])]
    return Table("Difference in top-1, points, paired by image; ± standard error", columns, rows)


def _difference(one: Mapping[str, float]) -> str:
    return f"{one['difference']:+.1f} ± {one['stderr']:.1f}"


def _told(rounds: Rounds) -> Table:
    rows: list[list[Cell]] = [
        [name.removesuffix(".norms"), TOLD[".norms" if name.endswith(".norms") else ""], *map(_course, by.values())]
        for name, by in rounds.items()
    ]
    columns = ["", "", *_percent(next(iter(rounds.values())))]
    return Table("The round that is kept, of all that were run; held-out divergence of one shot → of it", columns, rows)


def _course(rounds: Sequence[Report]) -> str:
    best = next(one for one in rounds if one["best"])
    return f"{best['round']} of {len(rounds)}; {rounds[0]['heldout_kl']:.3g} → {best['heldout_kl']:.3g}"


def _percent(by: Mapping[float, Any]) -> list[str]:
    return [f"{100 * sparsity:g} %" for sparsity in by]


def figures(found: Found) -> list[Figure]:
    """Accuracy over sparsity, a panel for each kind of norms."""
    return [Figure("accuracy", [_panel(with_norms(found, suffix), told) for suffix, told in TOLD.items()])]


def _panel(found: Found, told: str) -> Curves:
    lines = {
        name: Line([100 * sparsity for sparsity in by], [one.top1 for one in by.values()])
        for name, by in found.items()
        if name != "dense"
    }
    return Curves(told, "sparsity, %", "top-1, %", lines)
