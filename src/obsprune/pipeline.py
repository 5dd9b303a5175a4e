"""The whole story: a recipe becomes a sparse checkpoint with a report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from obsprune.core.patterns import Pattern
from obsprune.engine.allocation import Probe, choose, patterns_of
from obsprune.engine.effort import efforts
from obsprune.engine.layerwise import prune_blocks
from obsprune.engine.packing import drop_dense, pack_beside
from obsprune.engine.place import Place, Source, choose_place
from obsprune.engine.preflight import check_gradients, check_walk
from obsprune.engine.rounds import Rounds
from obsprune.engine.rundir import RunDir
from obsprune.engine.teacher import teach
from obsprune.errors import InputError
from obsprune.evaluate.task import Task
from obsprune.models.load import Model, load, locate, open_checkpoint
from obsprune.models.samples import Batch
from obsprune.plan import Plan, bytes_needed, make_plan, make_streams, make_tasks, run_facts
from obsprune.progress import Progress
from obsprune.ranks import ALONE, Ranks
from obsprune.recipe import Recipe
from obsprune.report.memory import MemoryWatch
from obsprune.report.report import Execution, build_report, read_report, write_report
from obsprune.resources import fitted, free_at, reckon, require
from obsprune.solvers.base import AnySolver


def prune(
    recipe: Recipe,
    output: Path,
    progress: Progress,
    force: bool = False,
    token: str | None = None,
    command: str = "",
    ranks: Ranks = ALONE,
    solver: AnySolver | None = None,
) -> dict[str, Any]:
    """Prunes, evaluates, reports. Returns the report; the sparse checkpoint is in `output`.

    ranks: the processes that share the work, all of which call this alike; solver: a caller's own, which the recipe
    describes (solvers.described) but cannot make. An unfinished run of the same recipe in `output` is continued.
    Raises InputError before anything is written.
    """
    begin = time.perf_counter()
    with MemoryWatch() as memory:
        plan, tasks, run = prepare(recipe, output, progress, force, token, ranks, solver)
        plan = carry_out(plan, tasks, run, progress)
        execution = Execution(time.perf_counter() - begin, memory.peak, command)
        report = build_report(run, plan.recipe.tree(), plan.model, plan.draw.facts, plan.notices, execution)
    ranks.told(lambda: write_report(run, report))
    run.record("end")
    return report


def prepare(
    recipe: Recipe,
    output: Path,
    progress: Progress,
    force: bool,
    token: str | None,
    ranks: Ranks,
    solver: AnySolver | None = None,
) -> tuple[Plan, list[Task], RunDir]:
    """The plan, what it is evaluated on, and its run, begun or continued. Raises InputError for all that can be known
    before anything is written.
    """
    source = ranks.agree(lambda: locate(recipe.model.name, recipe.model.revision, token))
    run = RunDir.open(output, source, force, ranks, [recipe.data.dataset, *recipe.evaluation])
    begun = (run.recorded("start") or {}).get("facts", {}).get("engine", {})
    plan = fitted(make_plan(recipe, token, ranks, solver), begun.get("batch_size"))
    plan = replace(plan, model=plan.model.keeping(recipe.engine.activations, run.disk))
    for notice in plan.notices:
        progress.notice(notice)
    tasks = plan_tasks(plan, progress)
    model, facts = plan.model, run_facts(plan)
    ranks.agree(lambda: require_same_everywhere(facts, ranks))
    small = model.kind.small(model.batches(plan.draw.calibration.take([0]), 1)[0])
    entered = ranks.agree(lambda: check_walk(model, small, progress))
    plan = replace(plan, efforts=efforts(model, all_tokens(plan, small, entered)))
    ranks.agree(lambda: require(reckon(plan, tasks), free_at(plan, output), plan))
    if recipe.iters > 1:
        ranks.agree(lambda: check_gradients(model, small))
    if run.start(plan.recipe.tree(), facts, [block.name for block in model.blocks], bytes_needed(plan)):
        progress.notice(f"continuing the unfinished run in {output}")
    return plan, tasks, run


def carry_out(plan: Plan, tasks: list[Task], run: RunDir, progress: Progress) -> Plan:
    """Evaluates, prunes, completes the checkpoint and evaluates again; returns the plan with the shares it took."""
    progress.ahead(0.0, "pruning")
    try:
        evaluate(plan.model, tasks, run, "dense", progress)
        if run.recorded("packed") is None:  # else the shards are gone
            plan = make_sparse(plan, tasks, run, progress)
    except BaseException:
        run.abandon()
        raise
    evaluate_result(plan.recipe, tasks, run, progress)
    if plan.recipe.format == "packed":
        pack_result(run, progress)
    return plan


def make_sparse(plan: Plan, tasks: list[Task], run: RunDir, progress: Progress) -> Plan:
    """The dense result, whole; returns the plan with the shares it took."""
    progress.ahead(0.0, "further trials")
    plan = share_out(plan, run, progress)
    rounds, last = plan.recipe.iters - 1, spent_on(tasks, run)
    progress.ahead(last, f"{rounds} more round{'s' if rounds > 1 else ''}" if rounds else "")
    prune_once(plan, run, progress)
    if rounds:
        progress.ahead(last, "more rounds")
        prune_again(plan, tasks, run, progress)
    run.finish(plan.model.checkpoint, plan.model.rest)
    return plan


def pack_result(run: RunDir, progress: Progress) -> None:
    """The packed result in the place of the dense one, which goes once the journal knows that it is not needed."""
    if run.recorded("packed") is None:
        told = run.record("packed", **run.ranks.told(lambda: pack_beside(run.path, progress)))
        progress.line(f"packed: {told['share']:.1%} of {told['dense_bytes'] / 1e6:.1f} MB of weights")
    run.ranks.told(lambda: drop_dense(run.path))


def prune_once(plan: Plan, run: RunDir, progress: Progress) -> None:
    """The first round: one shot."""
    if run.recorded("shot") and run.ranks.told(lambda: all(run.committed(block.name) for block in plan.model.blocks)):
        return
    start = time.perf_counter()
    before = sum(event["seconds"] for event in run.events if event["kind"] == "block")  # by a former part of the run
    one_shot(plan, plan.patterns, run, progress)
    run.record("shot", seconds=before + time.perf_counter() - start)


def one_shot(plan: Plan, patterns: Mapping[str, Pattern], run: RunDir, progress: Progress) -> None:
    """Prunes and matches block after block."""
    projection = replace(plan.projection, patterns=patterns)
    matching, reestimate = plan.recipe.make_matching(), plan.recipe.engine.reestimate_norms
    prune_blocks(plan.model, make_streams(plan), projection, run, progress, matching, reestimate, plan.efforts)


def share_out(plan: Plan, run: RunDir, progress: Progress) -> Plan:
    """The plan with the patterns of the allocation that is best on held-out text; its first shot is then done."""
    recipe, model = plan.recipe, plan.model
    if not recipe.rules:
        return plan
    event = run.recorded("allocation")
    if event is None:
        place = choose_place(model, recipe.rounds.memory, 2 * model.dtype.itemsize, run.scratch)
        with place.opened():
            judge = teach(place, plan.draw.heldout, plan.judged_at_once)
        parts = model.shared(plan.draw.calibration, plan.batch_size)
        assert recipe.sparsity is not None
        probe = Probe(place, plan.projection, recipe.sparsity, parts, judge, progress)
        event = choose(recipe.rules, probe, lambda patterns, trial: one_shot(plan, patterns, trial, progress), run)
    if run.recorded("shot") is None:
        run.adopt(run.trial(event["rule"]))
        run.record("shot", seconds=event["seconds"])
    return replace(plan, patterns=patterns_of(event["shares"]))


def prune_again(plan: Plan, tasks: list[Task], run: RunDir, progress: Progress) -> None:
    """All further rounds; the best one's weights are in `run` afterwards."""
    if run.recorded("best"):  # what led to it may be gone
        return
    recipe, model, shot = plan.recipe, plan.model, run.recorded("shot")
    assert shot is not None
    step, tuning = recipe.make_step(), recipe.make_tuning()
    place = choose_place(model, recipe.rounds.memory, plan.bytes_a_weight, run.scratch)
    projection = plan.projection
    for block in model.blocks:
        projection.coverage.recall(block, (run.recorded("block", name=block.name) or {}).get("coverage", []))
    evaluate = partial(score_iterate, recipe, tasks if recipe.rounds.scored else [], place, run, progress)
    sizes, patience = (plan.judged_at_once, plan.lesson_size), recipe.rounds.patience
    with place.opened():
        rounds = Rounds(step, tuning, projection, place, run, progress, *sizes, patience, evaluate)
        rounds(plan.draw.further, plan.draw.heldout, shot["seconds"])
    run.record("best")


def score_iterate(
    recipe: Recipe, tasks: list[Task], place: Place, run: RunDir, progress: Progress, number: int, weights: Source
) -> dict[str, Any]:
    """What the tasks say of a round's weights, which become a checkpoint for as long as that takes."""
    if not tasks:
        return {}
    trial = run.trial(f"round-{number}")
    for index, block in enumerate(place.model.blocks):
        with place.at(index, weights):
            trial.commit(block.name, block.tensors(), [], 0.0)
    trial.finish(place.model.checkpoint, place.model.rest)
    model = open_result(recipe, trial)
    scores = {task.name: task.score(model, progress, f"round {number}").numbers(task.metric) for task in tasks}
    run.discard(trial)
    return {"scores": scores}


def require_same_everywhere(facts: dict[str, Any], ranks: Ranks) -> None:
    """Raises InputError when a process sees another model, other samples or other versions than the first one."""
    # one checkpoint may have several copies: their files have other times, but the same sizes
    sizes = {file: size for file, (size, _) in facts["checkpoint"].items()}
    first, *others = ranks.gather(facts | {"checkpoint": sizes})
    for rank, other in enumerate(others, 1):
        differing = ", ".join(key for key in first if other[key] != first[key])
        if differing:
            raise InputError(
                f"process {rank} differs from process 0 in {differing}: all machines need the same packages, "
                "checkpoint and data"
            )


def plan_tasks(plan: Plan, progress: Progress) -> list[Task]:
    """The tasks to evaluate; default ones that cannot be had are left out with a notice, asked ones are an error."""
    ranks = plan.model.ranks
    tasks, notices = ranks.agree(lambda: make_tasks(plan))
    everywhere = set.intersection(*ranks.gather({task.material for task in tasks}))
    notices += [f"{t.name} is left out: not every process has the same" for t in tasks if t.material not in everywhere]
    tasks = [task for task in tasks if task.material in everywhere]
    plan.notices.extend(notices)
    for notice in notices:
        progress.notice(notice)
    return tasks


def all_tokens(plan: Plan, batch: Batch, entered: Mapping[str, int]) -> dict[str, float]:
    """How many tokens enter each matrix in all of the calibration, where so many of a batch with one sample do."""
    calibration = plan.draw.calibration
    shown = batch["input_ids"].numel() if plan.model.kind.positional else 1
    return {name: count * len(calibration) * calibration.positions / shown for name, count in entered.items()}


def spent_on(tasks: list[Task], run: RunDir) -> float:
    """Seconds that the dense model's scores have taken, as far as they are known: a pruned one's take as many."""
    scores = (run.recorded("score", task=task.name, who="dense") for task in tasks)
    return sum(float(score["seconds"]) for score in scores if score)


def evaluate(model: Model, tasks: list[Task], run: RunDir, who: str, progress: Progress) -> None:
    """Scores every task that the run has no score of yet."""
    for task in tasks:
        if run.recorded("score", task=task.name, who=who, sha256=task.protocol["sha256"]) is None:
            start = time.perf_counter()
            found = task.score(model, progress, who)
            seconds = time.perf_counter() - start
            run.record("score", task=task.name, who=who, **found.values, seconds=seconds, items=found.items)
            damaged = found.values.get("damaged", {}).get("count", 0)
            if damaged:
                progress.notice(f"{task.name}: {damaged} images cannot be read and are left out")


def evaluate_result(recipe: Recipe, tasks: list[Task], run: RunDir, progress: Progress) -> None:
    """Scores the finished checkpoint as anybody would load it."""
    progress.ahead(0.0)
    if tasks:
        evaluate(open_result(recipe, run), tasks, run, "pruned", progress)


def open_result(recipe: Recipe, run: RunDir) -> Model:
    """The finished checkpoint of a run."""
    part = recipe.model
    model = load(str(run.path), dtype=part.dtype, device=recipe.engine.device, blocks=part.blocks,
                 trust_remote_code=part.trust_remote_code, ranks=run.ranks)  # fmt: skip
    return model.keeping(recipe.engine.activations, run.disk)


def inspect_result(directory: Path) -> dict[str, Any]:
    """The report's matrices, of a result whose files are all there; no weight is read. Raises InputError."""
    report = read_report(directory)
    open_checkpoint(directory)
    told = {key: report.get(key, []) for key in ("matrices", "coverage")}  # train-prune knows no coverage
    return {"output": str(directory), "sparsity": report["sparsity"], **told}
