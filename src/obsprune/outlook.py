"""What is known of a run before it begins: its plan, what it needs, and how long it will take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsprune.errors import ObspruneError
from obsprune.forecast import Forecast, forecast
from obsprune.plan import Plan, make_plan, make_tasks
from obsprune.progress import Progress
from obsprune.ranks import ALONE, Ranks
from obsprune.recipe import Recipe
from obsprune.resources import Free, Needs, fitted, free_at, reckon, require


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before it begins. forecast: None where nothing can be tried; free: what there is, in
    bytes; notices: the plan's, and those about tasks.
    """

    plan: Plan
    needs: Needs
    free: Free
    forecast: Forecast | None
    notices: list[str]


def look_ahead(
    recipe: Recipe, output: Path, progress: Progress, token: str | None = None, ranks: Ranks = ALONE
) -> Outlook:
    """The plan, what it needs, and how long it will take; writes nothing that stays. Raises InputError when memory or
    disk do not suffice.
    """
    plan = fitted(make_plan(recipe, token, ranks))
    tasks, missing = ranks.agree(lambda: make_tasks(plan))
    notices, needs, free = [*plan.notices, *missing], reckon(plan, tasks), free_at(plan, output)
    ranks.agree(lambda: require(needs, free, plan))
    try:
        expected = forecast(plan, tasks, output, progress)
    except ObspruneError as error:  # a few tokens may be too few for what the run can do with many
        return Outlook(plan, needs, free, None, [*notices, f"how long it takes cannot be tried: {error}"])
    return Outlook(plan, needs, free, expected, notices)


def describe(outlook: Outlook) -> dict[str, Any]:
    """What is known, as plain values, for machines."""
    seconds = outlook.forecast.tree() if outlook.forecast else None
    told = {"notices": outlook.notices, "seconds": seconds, "memory": outlook.needs.tree()}
    return {**_plain(outlook.plan), **told, "free": outlook.free.tree()}


def _plain(plan: Plan) -> dict[str, Any]:
    return {
        "recipe": plan.recipe.tree(),
        "matrices": [
            {"name": m.name, "shape": m.shape, "zeros": plan.patterns[m.name].pruned(*m.shape)}
            for m in plan.model.matrices
        ],
        "skipped": plan.model.skipped,
        "data": plan.draw.facts,
    }
