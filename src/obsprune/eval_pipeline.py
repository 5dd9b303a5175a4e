"""The story of eval: a checkpoint becomes a score, alone or beside another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from obsprune.engine.rundir import RECIPE
from obsprune.errors import InputError
from obsprune.evaluate.paired import beside, paired
from obsprune.evaluate.task import Scored, Task
from obsprune.evaluate.tasks import Setting, check_name, make_task
from obsprune.finetune_recipe import recorded
from obsprune.models.caution import is_file
from obsprune.models.load import Model, load
from obsprune.models.samples import Samples
from obsprune.plan import draw_samples, kept_apart, suited
from obsprune.progress import Progress
from obsprune.ranks import ALONE
from obsprune.recipe import Recipe, make_recipe


@dataclass(frozen=True)
class Contestant:
    """A checkpoint and its tasks, which it reads with its own tokenizer or processor."""

    name: str
    model: Model
    tasks: list[Task]

    def score(self, task: Task, progress: Progress) -> Scored:
        return task.score(self.model, progress, self.name)


def evaluate_checkpoint(
    name: str, names: list[str], progress: Progress, compare: str | None = None, limit: int | None = None, **how: Any
) -> dict[str, Any]:
    """Scores of a checkpoint on tasks, and of another beside it. how: seqlen, dtype, device, revision, token, ranks, …

    A directory made by `prune` remembers its recipe: without names, its held-out text is used.
    """
    ranks = how.get("ranks", ALONE)
    one, other = ranks.agree(lambda: _contestants(name, names, compare, limit, **how))
    if other is None:
        alone = {task.name: {"model": one.score(task, progress).values} for task in one.tasks}
        return {"model": name, "compare": None, "tasks": alone}
    found = {
        task.name: _side_by_side(one.score(task, progress), other.score(same, progress))
        for task, same in zip(one.tasks, other.tasks, strict=True)
    }
    return {"model": name, "compare": compare, "tasks": found}


def _contestants(
    name: str, names: list[str], compare: str | None, limit: int | None, **how: Any
) -> tuple[Contestant, Contestant | None]:
    seqlen, num_fewshot = how.pop("seqlen", None), how.pop("num_fewshot", None)
    for task_name in names:
        check_name(task_name)
    model = load(name, **how)
    recipe = recorded_recipe(model.directory)
    chosen = names or default_tasks(recipe, model)
    if "heldout" in chosen and recipe is None:
        raise InputError(f"{name} was not made by obsprune and has nothing held out; name a task: --task TASK")
    like = suited(recipe or make_recipe(), model.kind)

    def entered(name: str, one: Model) -> Contestant:
        held = partial(_held_again, like, one)
        setting = Setting(one, seqlen or like.data.seqlen, held, limit, num_fewshot)
        return Contestant(name, one, [make_task(task, setting) for task in chosen])

    first = entered(name, model)
    if not compare:
        return first, None
    other = load(compare, **how)
    if other.kind is not model.kind:
        raise InputError(
            f"{name} is for {model.kind.reads} and {compare} for {other.kind.reads}; they cannot be compared"
        )
    second = entered(compare, other)
    _require_same(first, second)
    return first, second


def _require_same(one: Contestant, other: Contestant) -> None:
    for task, same in zip(one.tasks, other.tasks, strict=True):
        if task.material != same.material:
            raise InputError(
                f"task {task.name} is not the same for {one.name} and {other.name}: their tokenizers cut the text into "
                "other tokens, or they were not given the same items; the scores cannot be compared"
            )


def _side_by_side(first: Scored, second: Scored) -> dict[str, Any]:
    pair = {"model": first.values, "compare": second.values, **beside(first.values, second.values)}
    return {**pair, "paired": paired(first.items, second.items)}


def _held_again(recipe: Recipe, model: Model) -> tuple[Samples, str]:
    return kept_apart(recipe, draw_samples(recipe, model)[0])


def default_tasks(recipe: Recipe | None, model: Model) -> list[str]:
    """What suits a model when no task is named: what its own run was evaluated on, else WikiText-2."""
    if recipe is not None:
        names = [name for name in recipe.evaluation if name != "none"] or ["heldout"]
        if files := [name for name in names if is_file(Path(name))]:
            raise InputError(
                f"{model.directory} was evaluated on {files[0]}, a file of lm_eval, which may run code; name what you "
                "trust: --task TASK"
            )
        return names
    if model.kind.dataset is None:
        raise InputError(f"{model.directory} is an {model.kind.name}: name its images, --task imagenet=PATH")
    return ["wikitext2"]


def recorded_recipe(directory: Path) -> Recipe | None:
    """The recipe a directory was made by, if obsprune made it."""
    path = directory / RECIPE
    if not path.is_file():
        return None
    try:
        return recorded(path)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
