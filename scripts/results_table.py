"""Writes docs/results.md from the recipes and their committed results: our numbers beside the published ones.

    python scripts/results_table.py

Only values that somebody else has published or proved stand there, and those of ours that contradict them: what a
recipe expects because we measured it ourselves guards against drift and says nothing about a paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from obsprune.recipe import make_recipe
from obsprune.studies.recipes import RESULTS, Expected, PaperRecipe, judge, names, needs_gpu, root
from obsprune.trees import merge

PAGE = Path(__file__).parents[1] / "docs/results.md"
OURS = ("measured here", "sanity")
"""How the source of a value begins that no publication gives."""
AGAINST = "against the"
"""In the source of a value of ours that contradicts a publication."""
INTRODUCTION = """# Our numbers beside the published ones

Made by `scripts/results_table.py` from `recipes/*/*.yaml` and the results that lie beside them; every row can be had
again by `obsprune recipe run RECIPE`. *Published* is what the source says, with the tolerance we allow, or the bound it
sets, or a claim carried over to a model that the publication did not try (the source says so). † The source could not
be checked by us against the publication itself. Rows without a number of ours need a GPU and data that were not at
hand. What the numbers mean, and what was found beside them, is in each folder's README.
"""


def page() -> str:
    """The whole of it."""
    papers = dict.fromkeys(name.partition("/")[0] for name in names())
    sections = {paper: list(rows(paper)) for paper in papers}
    return "\n".join([INTRODUCTION, *(section(paper, lines) for paper, lines in sections.items() if lines)])


def section(paper: str, lines: list[str]) -> str:
    """The table of one paper."""
    title = (root() / paper / "README.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    head = ["| value | ours | published | | protocol | source |", "|---|---|---|---|---|---|"]
    return "\n".join([f"## {title}", "", f"[recipes/{paper}](../recipes/{paper}/README.md)", "", *head, *lines, ""])


def rows(paper: str) -> Iterator[str]:
    """A line for every published value of a paper's recipes."""
    for name in names():
        if name.partition("/")[0] == paper:
            recipe = PaperRecipe.read(root() / f"{name}.yaml")
            found, told = results(name), protocol(name, recipe)
            for key, expected in recipe.expectations.items():
                if not expected.source.startswith(OURS) or AGAINST in expected.source:
                    yield row(f"{name.partition('/')[2]}: {key}", expected, found, key, told)


def row(title: str, expected: Expected, found: dict[str, Any], key: str, told: str) -> str:
    """One line. found: our values, none where it was not run."""
    unverified = " †" if "unverified" in expected.source else ""
    against = expected.source.startswith(OURS)
    published = "" if against else f"{expected}{unverified}"
    if not found:
        return f"| {title} | – | {published} | not run | {told} | {expected.source} |"
    [judged] = judge({key: expected}, {name: value for name, value in found.items() if value is not None})
    ours = "–" if judged.found is None else f"{judged.found:.4g}"
    verdict = "holds" if judged.met and not against else "**differs**"
    return f"| {title} | {ours} | {published} | {verdict} | {told} | {expected.source} |"


def results(name: str) -> dict[str, Any]:
    """Our values by name; none where it was not run."""
    paper, _, own = name.partition("/")
    path = root() / paper / "results" / own / RESULTS
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["values"] if path.is_file() else {}
    return values


def protocol(name: str, recipe: PaperRecipe) -> str:
    """What was done, as the recipe's first line and its settings say."""
    with (root() / f"{name}.yaml").open(encoding="utf-8") as file:
        title = file.readline().removeprefix("# ").partition(";")[0].strip()
    evaluated = evaluation(recipe.settings) if recipe.study == "pruning" else ""
    seeds = recipe.settings.get("seeds", 1)
    return f"{title}{evaluated}" + (f"; {seeds} seeds" if seeds > 1 else "") + ("; GPU" if needs_gpu(name) else "")


def evaluation(settings: dict[str, Any]) -> str:
    """On what a checkpoint is calibrated and evaluated."""
    form = next(iter(settings["forms"].values()))
    data = make_recipe(merge(settings.get("common", {}), form)).data
    tasks = [task.replace("{data}/", "") for task in settings.get("evaluation", [])]
    told = " and ".join(tasks) or "three of every five images, calibrated on the others"
    source = settings["dataset"].replace("{data}/", "")
    if source.startswith("imagenet="):
        return f"; calibrated on {data.nsamples} images of {source.removeprefix('imagenet=')}, evaluated on {told}"
    rows = f"{data.nsamples} x {data.seqlen} tokens of {source}"
    return f"; calibrated on {rows}, evaluated on {told}, rows of {data.seqlen}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
