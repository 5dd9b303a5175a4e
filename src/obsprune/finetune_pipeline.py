"""The story of `finetune`: a sparse checkpoint is trained, its zeros stay; then report and checkpoint as of `prune`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor

from obsprune.engine.distillation import Course, Distillation, best
from obsprune.engine.rundir import ROUNDS, RunDir
from obsprune.errors import InputError
from obsprune.evaluate.task import Task
from obsprune.evaluate.tasks import check_name
from obsprune.finetune_recipe import FinetuneRecipe, suitable_rate
from obsprune.models.activations import free_bytes
from obsprune.models.checkpoint import copy_side_files
from obsprune.models.kinds import Wish
from obsprune.models.load import Model, load, locate
from obsprune.models.rewrite import files_of, rewrite
from obsprune.pipeline import evaluate, plan_tasks, require_same_everywhere
from obsprune.plan import Plan, default_dataset, draw_samples, machine_facts, open_model
from obsprune.progress import Progress
from obsprune.ranks import ALONE, Ranks
from obsprune.report.finetuning import build_finetuning_report
from obsprune.report.memory import MemoryWatch
from obsprune.report.report import Execution, read_report, write_report

BYTES = 17
"""Of memory for each weight: itself, its gradient, two moments, all float32, and its place in the mask."""
SAVED = 12
"""Of disk, in a state that a run goes on from."""


@dataclass(frozen=True)
class FinetunePlan:
    """What a recipe comes to, before anything is computed. common: its model, draw and notices; teacher: the dense
    model; zeros: {matrix's name: how many}.
    """

    recipe: FinetuneRecipe
    common: Plan
    teacher: Model | None
    zeros: Mapping[str, int]

    @property
    def model(self) -> Model:
        return self.common.model

    @property
    def course(self) -> Course:
        return self.recipe.make_course()

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the forward passes."""
        wide = "bfloat16" if self.model.device.type == "cuda" else "float32"
        asked = self.recipe.model.dtype if self.recipe.model.dtype != "auto" else wide
        return torch.bfloat16 if asked == "bfloat16" else torch.float32

    @cached_property
    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(torch.Size(header.shape).numel() for header in self.model.checkpoint.headers.values())

    @property
    def bytes(self) -> int:
        """Of the device's memory, before any activation."""
        return BYTES * self.parameters + (self.teacher.checkpoint.bytes if self.teacher else 0)


def make_finetune_plan(recipe: FinetuneRecipe, token: str | None = None, ranks: Ranks = ALONE) -> FinetunePlan:
    """Opens the models, draws the samples, counts the zeros. Writes nothing. Raises InputError."""
    plan = ranks.agree(lambda: _planned(recipe, token, ranks))
    ranks.agree(lambda: _require_room(plan))
    return plan


def _planned(recipe: FinetuneRecipe, token: str | None, ranks: Ranks) -> FinetunePlan:
    for task in recipe.evaluation:
        if task != "none":
            check_name(task)  # before anything is loaded
    model = open_model(recipe.like, token, ranks)
    files_of(model)  # or InputError
    zeros = _zeros(model)
    teacher = _open_teacher(recipe, model, token) if recipe.tuning.teacher else None
    recipe = _suited(recipe, model)
    _require_enough(recipe, model, teacher)
    drawn, notices = draw_samples(recipe.like, model)
    if not len(drawn.heldout):
        raise InputError(
            f"the best step is chosen by held-out {drawn.heldout.unit}, and there are none: set data.heldout above 0"
        )
    for samples in (drawn.calibration, drawn.heldout):
        ranks.mine(len(samples))  # or InputError
    if teacher is None:
        notices += _hint(model)
    common = Plan(recipe.like, model, drawn, recipe.like.make_solver(), {}, notices)
    return FinetunePlan(recipe, common, teacher, zeros)


def _zeros(model: Model) -> dict[str, int]:
    """Of each matrix. Raises InputError when nothing is zero."""
    names = {matrix.name for matrix in model.matrices}
    weights = (item for block in model.blocks for item in block.weights().items())
    zeros = {name: int((weight == 0).sum()) for name, weight in weights if name in names}
    if not any(zeros.values()):
        raise InputError(
            f"{model.directory} is dense: none of its {len(names)} matrices has a zero; prune it first: obsprune prune"
        )
    return zeros


def _open_teacher(recipe: FinetuneRecipe, model: Model, token: str | None) -> Model:
    """The dense model. Raises InputError when it cannot answer what the sparse one is asked."""
    name, part = str(recipe.tuning.teacher), recipe.model
    if locate(name, None, token).resolve() == model.directory.resolve():
        raise InputError(f"--teacher {name} is the sparse checkpoint itself; name the dense one it was pruned from")
    teacher = load(name, token=token, dtype=part.dtype, device=recipe.device, blocks=part.blocks,
                   trust_remote_code=part.trust_remote_code, ranks=model.ranks)  # fmt: skip
    if teacher.kind is not model.kind or teacher.classes != model.classes:
        raise InputError(
            f"--teacher {name} is a {teacher.kind.name} of {teacher.classes:,} answers, and {part.name} a "
            f"{model.kind.name} of {model.classes:,}; a teacher has the same vocabulary, or the same classes"
        )
    if other := _other_word(model, teacher):
        raise InputError(f"--teacher {name} has another vocabulary: {other!r} is another token there")
    return teacher


def _other_word(model: Model, teacher: Model) -> str | None:
    """A word that the tokenizers of both number differently; None where one of them has no tokenizer."""
    try:
        words, others = (dict(one.processor.get_vocab()) for one in (model, teacher))
    except (InputError, AttributeError):  # token ids need none, images have none
        return None
    return next((word for word, number in words.items() if others.get(word, number) != number), None)


def _suited(recipe: FinetuneRecipe, model: Model) -> FinetuneRecipe:
    """With the numbers that suit the model and its data, where none were given. Raises InputError."""
    part, tuning, kind = recipe.data, recipe.tuning, model.kind
    if tuning.lr is None:
        tuning = replace(tuning, lr=suitable_rate(model.config))
    heldout = kind.heldout if part.heldout is None else part.heldout
    nsamples = part.nsamples or _available(recipe, model, tuning.steps * tuning.batch_size, heldout)
    return replace(recipe, tuning=tuning, data=replace(part, nsamples=nsamples, heldout=heldout))


def _available(recipe: FinetuneRecipe, model: Model, wanted: int, heldout: int) -> int:
    """As many samples as the steps take, or all there are beside those held out. Raises InputError for none."""
    part = recipe.data
    source, _ = model.open(Wish(part.dataset or default_dataset(recipe.like, model), part.seqlen, part.text_column))
    found = source.sample(wanted + heldout, torch.Generator().manual_seed(recipe.seed))
    if len(found) <= heldout:
        raise InputError(f"{source.name} gives {len(found)} {found.noun}, and {heldout} are held out; {found.remedy}")
    return min(wanted, len(found) - heldout)


def _require_enough(recipe: FinetuneRecipe, model: Model, teacher: Model | None) -> None:
    """Raises InputError for what has no loss, or leaves a process without work."""
    size, ranks = recipe.tuning.batch_size, model.ranks
    if size < ranks.size:
        raise InputError(f"--batch-size {size} leaves some of {ranks.size} processes without a sample")
    if teacher is None and not model.kind.positional:
        raise InputError(f"an {model.kind.name} is tuned toward the dense model's answers: --teacher DENSE")


def _require_room(plan: FinetunePlan) -> None:
    """Raises InputError when weights, gradients and moments alone do not fit."""
    free, device = free_bytes(plan.model.device), plan.model.device
    if plan.bytes > free:
        raise InputError(
            f"weights, gradients, moments and the teacher take {plan.bytes / 1e9:.2f} GB on {device} in each process, "
            f"and {free / 1e9:.2f} GB are free; use a larger device, or obsprune.keep_sparse with FSDP2"
        )


def _hint(model: Model) -> list[str]:
    """What could be distilled from, where nobody said it."""
    try:
        report = read_report(model.directory)
        source = report["tuning"]["teacher"] if "tuning" in report else report["model"]["source"]
    except (InputError, LookupError, TypeError):
        return []
    came = f"{model.directory} comes from {source}: --teacher {source} distils"
    return [f"the next token alone is learned; {came}"] if source else []


def finetune(
    recipe: FinetuneRecipe,
    output: Path,
    progress: Progress,
    force: bool = False,
    token: str | None = None,
    command: str = "",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains a sparse checkpoint, evaluates, reports. Returns the report; the sparse checkpoint is in `output`.

    An unfinished run of the same recipe in `output` is continued from the state it has written last. Raises InputError
    before anything is written.
    """
    begin = time.perf_counter()
    with MemoryWatch() as memory:
        plan, tasks, run = prepare(recipe, output, progress, force, token, ranks)
        result = carry_out(plan, tasks, run, progress)
        execution = Execution(time.perf_counter() - begin, memory.peak, command)
        data, notices = plan.common.draw.facts, plan.common.notices
        report = build_finetuning_report(run, plan.recipe.tree(), plan.model, result, data, notices, execution)
    ranks.told(lambda: write_report(run, report))
    run.record("end")
    return report


def prepare(
    recipe: FinetuneRecipe, output: Path, progress: Progress, force: bool, token: str | None, ranks: Ranks
) -> tuple[FinetunePlan, list[Task], RunDir]:
    """The plan, what it is evaluated on, and its run, begun or continued. Raises InputError for all that can be known
    before anything is written.
    """
    source = ranks.agree(lambda: locate(recipe.model.name, recipe.model.revision, token))
    names = [recipe.tuning.teacher, recipe.data.dataset, *recipe.evaluation]
    run = RunDir.open(output, source, force, ranks, names)
    plan = make_finetune_plan(recipe, token, ranks)
    for notice in plan.common.notices:
        progress.notice(notice)
    tasks, facts = plan_tasks(plan.common, progress), run_facts(plan)
    ranks.agree(lambda: require_same_everywhere(facts, ranks))
    if run.start(plan.recipe.tree(), facts, [], plan.model.checkpoint.bytes + 3 * SAVED * plan.parameters):
        progress.notice(f"continuing the unfinished run in {output}")
    return plan, tasks, run


def carry_out(plan: FinetunePlan, tasks: list[Task], run: RunDir, progress: Progress) -> Model:
    """Evaluates, trains, completes the checkpoint and evaluates again; returns the result."""
    part, model, draw = plan.recipe.tuning, plan.model, plan.common.draw
    try:
        if plan.teacher:
            evaluate(plan.teacher, tasks, run, "dense", progress)
        evaluate(model, tasks, run, "pruned", progress)
        course = Distillation(model, plan.teacher, plan.course, plan.compute, part.checkpointing, draw.calibration,
                              draw.heldout, run, progress)  # fmt: skip
        weights = course()
    except BaseException:
        run.abandon()
        raise
    if not best(run):
        progress.notice("no step was better on what is held out: the result has the weights it was given; lower --lr")
    model.ranks.told(lambda: _write(model, weights, run, progress))
    result = load(str(run.path), dtype=plan.recipe.model.dtype, device=plan.recipe.device, ranks=model.ranks,
                  blocks=plan.recipe.model.blocks, trust_remote_code=model.trust_remote_code)  # fmt: skip
    evaluate(result, tasks, run, "tuned", progress)
    return result


def _write(model: Model, weights: Mapping[str, Tensor], run: RunDir, progress: Progress) -> None:
    """The result, its config last: now it can be loaded."""
    rewrite(model, weights, run.path, progress)
    copy_side_files(model.checkpoint.directory, run.path)
    rmtree(run.path / ROUNDS, ignore_errors=True)


def run_facts(plan: FinetunePlan) -> dict[str, Any]:
    """What must not change for a run to be continued: all that decides its bytes."""
    recipe = {key: value for key, value in plan.recipe.tree().items() if key != "evaluation"}
    hashes = {key: plan.common.draw.facts[key] for key in ("sha256", "heldout_sha256")}
    teacher = machine_facts(plan.teacher) if plan.teacher else {}
    return {
        **recipe,
        **machine_facts(plan.model),
        **hashes,
        "compute": str(plan.compute),
        "teacher_config": teacher.get("config"),
        "teacher_checkpoint": {file: size for file, (size, _) in teacher.get("checkpoint", {}).items()},
    }


def describe(plan: FinetunePlan) -> dict[str, Any]:
    """A plan as plain values, for machines."""
    return {
        "recipe": plan.recipe.tree(),
        "zeros": dict(plan.zeros),
        "parameters": plan.parameters,
        "memory_bytes": plan.bytes,
        "data": plan.common.draw.facts,
        "notices": plan.common.notices,
    }
