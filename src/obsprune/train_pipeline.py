"""The story of `train-prune`: pruning in steps with retraining in between; then report and checkpoint as of `prune`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from obsprune.engine.retrained import Course, Retrained, check_training, labelled
from obsprune.engine.rundir import RunDir
from obsprune.errors import InputError
from obsprune.evaluate.task import Task
from obsprune.evaluate.tasks import check_name
from obsprune.models.images import ImageSamples
from obsprune.models.load import Model, locate
from obsprune.models.samples import Batch
from obsprune.pipeline import evaluate, evaluate_result, plan_tasks
from obsprune.plan import Plan, draw_samples, machine_facts, open_model, uniform_patterns
from obsprune.progress import Progress
from obsprune.report.memory import MemoryWatch
from obsprune.report.report import Execution, build_training_report, write_report
from obsprune.training_recipe import TrainingRecipe

FEW = 100
"""With more classes than this, passes for each of them take hours."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a recipe comes to, before anything is computed. common: its model, draw and notices; images: those to train
    on.
    """

    recipe: TrainingRecipe
    common: Plan
    images: ImageSamples
    course: Course

    @property
    def model(self) -> Model:
        return self.common.model

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the forward passes."""
        return torch.float32 if self.recipe.compute == "float32" else torch.bfloat16

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says about the images."""
        count = len(self.images)
        return self.common.draw.facts | {"trained": count, "updates": self.course.updates(count)}

    @property
    def drawn(self) -> ImageSamples:
        """The images that scores are measured on."""
        samples = self.common.draw.calibration
        assert isinstance(samples, ImageSamples)  # make_training_plan has refused other kinds
        return samples

    def scored(self) -> list[Batch]:
        """The labelled images that scores are measured on; none where a method looks at no data."""
        return labelled(self.drawn, self.course.batch_size, self.model.device) if self.recipe.method.sees else []


def make_training_plan(recipe: TrainingRecipe, token: str | None = None) -> TrainingPlan:
    """Opens the model, draws the images, makes the course. Writes nothing. Raises InputError."""
    for task in recipe.evaluation:
        if task != "none":
            check_name(task)  # before anything is loaded
    like, name = recipe.like, recipe.model.name
    model = open_model(like, token)
    if model.kind.reads != "images":
        raise InputError(
            f"{name} is a {model.kind.name}, and train-prune retrains image classifiers by their labels; use "
            f"obsprune prune {name} --iters 3"
        )
    patterns = uniform_patterns(like, model)
    drawn, notices = draw_samples(like, model)
    assert isinstance(drawn.heldout, ImageSamples)
    images = drawn.heldout.others()
    images.labelled(images.name, "training", "--dataset")
    if recipe.training.curvature == "gauss-newton" and model.classes > FEW:
        raise InputError(
            f"gauss-newton takes a backward pass for each class, and {name} has {model.classes:,}; use --curvature "
            "sample or kfac"
        )
    notices.append(f"{len(images):,} images to train on, {len(drawn.heldout):,} others held out")
    plan = Plan(like, model, drawn, like.make_solver(), patterns, notices)
    return TrainingPlan(recipe, plan, images, recipe.make_course())


def train_prune(
    recipe: TrainingRecipe,
    output: Path,
    progress: Progress,
    force: bool = False,
    token: str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Prunes and retrains in steps, evaluates, reports. Returns the report; the sparse checkpoint is in `output`.

    An unfinished run of the same recipe in `output` is continued after its last whole step. Raises InputError before
    anything is written.
    """
    begin = time.perf_counter()
    with MemoryWatch() as memory:
        plan, tasks, run, facts = prepare(recipe, output, progress, force, token)
        carry_out(plan, tasks, run, progress)
        execution = Execution(time.perf_counter() - begin, memory.peak, command)
        report = build_training_report(run, recipe.tree(), plan.model, facts, plan.common.notices, execution)
    write_report(run, report)
    run.record("end")
    return report


def prepare(
    recipe: TrainingRecipe, output: Path, progress: Progress, force: bool, token: str | None
) -> tuple[TrainingPlan, list[Task], RunDir, dict[str, Any]]:
    """The plan, what it is evaluated on, its run, begun or continued, and what a report says about the images. Raises
    InputError for all that can be known before anything is written.
    """
    source = locate(recipe.model.name, recipe.model.revision, token)
    run = RunDir.open(output, source, force, names=[recipe.data.dataset, *recipe.evaluation])
    plan = make_training_plan(recipe, token)
    for notice in plan.common.notices:
        progress.notice(notice)
    tasks = plan_tasks(plan.common, progress)
    check(plan, progress)
    facts = plan.facts | {"trained_sha256": plan.images.content_hash()}
    if run.start(recipe.tree(), run_facts(plan, facts), [b.name for b in plan.model.blocks], bytes_needed(plan.model)):
        progress.notice(f"continuing the unfinished run in {output}")
    return plan, tasks, run, facts


def carry_out(plan: TrainingPlan, tasks: list[Task], run: RunDir, progress: Progress) -> None:
    """Evaluates, prunes and retrains in steps, completes the checkpoint and evaluates again."""
    try:
        evaluate(plan.model, tasks, run, "dense", progress)
        Retrained(plan.model, plan.course, plan.compute, plan.scored, plan.images, run, progress)()
    except BaseException:
        run.abandon()
        raise
    run.finish(plan.model.checkpoint, plan.model.rest)
    evaluate_result(plan.recipe.like, tasks, run, progress)


def check(plan: TrainingPlan, progress: Progress) -> None:
    """Before an hour is spent: every weight is there, and a gradient reaches every matrix."""
    progress.stage("checking model and images", 1)
    check_training(plan.model, plan.compute, labelled(plan.drawn.take([0]), 1, plan.model.device)[0])


def run_facts(plan: TrainingPlan, data: dict[str, Any]) -> dict[str, Any]:
    """What must not change for a run to be continued: all that decides its bytes."""
    recipe = {key: value for key, value in plan.recipe.tree().items() if key != "evaluation"}
    hashes = {key: data[key] for key in ("sha256", "heldout_sha256", "trained_sha256")}
    return {**recipe, **machine_facts(plan.model), **hashes}


def bytes_needed(model: Model) -> int:
    """Of disk: the result, and the weights of two steps in float32."""
    headers = model.checkpoint.headers
    inside = sum(torch.Size(headers[key].shape).numel() for block in model.blocks for key in block.keys)
    return model.checkpoint.bytes + 2 * (4 + 1) * inside  # a mask has a byte for each weight


def describe(plan: TrainingPlan) -> dict[str, Any]:
    """A plan as plain values, for machines."""
    return {
        "recipe": plan.recipe.tree(),
        "matrices": [{"name": m.name, "shape": m.shape} for m in plan.model.matrices],
        "skipped": plan.model.skipped,
        "sparsities": list(plan.course.sparsities),
        "data": plan.facts,
        "notices": plan.common.notices,
    }
