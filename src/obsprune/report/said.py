"""Numbers and names as a page says them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from obsprune.evaluate.paired import FLIPS
from obsprune.report.pathless import pathless

UNITS = ("sequences", "images", "questions", "documents")
SPEED, FACTS = {"seconds", "images_per_second"}, {"crop_pct", "param_count"}
"""Numbers of a score that say nothing of how good a model is."""
DERIVED = ("_stderr", "_err")
"""How numbers end that belong to another one: its standard error, what it lacks to all."""
NOT_FINITE = "not finite"
FLOOR = 1 / (FLIPS + 1)
"""The least p that signs turned at random can give: it may be less."""


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether there is a number to speak of: what is none has no place in JSON, and is null in a report."""
    return value is not None and math.isfinite(value)


def probability(p: float) -> str:
    """Two digits; what may be less, as a bound."""
    return f"{'≤ ' if math.isclose(p, FLOOR) else ''}{p:.2g}"


def number(value: float | None) -> str:
    """Four digits at most."""
    return f"{value:.4g}" if is_finite(value) else NOT_FINITE


def score(value: float | None) -> str:
    """Four digits after the point, as scores are compared."""
    return f"{value:.4f}" if is_finite(value) else NOT_FINITE


def percent(share: float) -> str:
    """A share, exact enough to see that a pattern was met."""
    return f"{100 * share:.2f} %"


def seconds(value: float | None) -> str:
    """A time."""
    if not is_finite(value):
        return NOT_FINITE
    if value < 120:
        return f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.2g} ms"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def plain(value: Any) -> str:
    """Any value of a report in a sentence."""
    if value is None or isinstance(value, float):
        return number(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def task(name: str) -> str:
    """A task without the folder of its file."""
    return pathless(name)


def counted(many: int, one: str, more: str) -> str:
    """So many of something."""
    return f"{many:,} {one if many == 1 else more}"


def measured_on(values: Mapping[str, Any]) -> str:
    """How much a score was measured on."""
    if "sequences" in values:
        return f"{values['sequences']:,} × {values['seqlen']:,} tokens"
    unit = next((unit for unit in UNITS if unit in values), None)
    return f"{values[unit]:,} {unit}" if unit else ""


def metrics(values: Mapping[str, Any]) -> list[str]:
    """The names of what was measured, the headline first."""
    numbers = [name for name, value in values.items() if isinstance(value, float) and not name.endswith(DERIVED)]
    return [values["metric"], *(name for name in numbers if name not in SPEED | FACTS | {values["metric"]})]
