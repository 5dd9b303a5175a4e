"""The whole story: a recipe becomes a sparse checkpoint with a report; a checkpoint becomes a score."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from obsprune import __version__
from obsprune.core.patterns import Pattern
from obsprune.engine.layerwise import prune_blocks
from obsprune.engine.place import choose_place
from obsprune.engine.preflight import check_gradients, check_walk
from obsprune.engine.rounds import Rounds
from obsprune.engine.rundir import RECIPE, RunDir
from obsprune.engine.steps import Projection
from obsprune.engine.streams import OneStream, Streams, TwoStreams
from obsprune.errors import InputError
from obsprune.evaluate.tasks import Task, check_name, rows_task, text_task
from obsprune.models.checkpoint import Checkpoint
from obsprune.models.data import Draw, batches, content_hash, draw, open_corpus
from obsprune.models.load import DEMO, Model, load, locate
from obsprune.progress import Progress
from obsprune.recipe import DEFAULT_DATASET, Recipe, make_recipe, read_recipe
from obsprune.report.report import build_report, read_report, write_report

LOGIT_BYTES = 2**29
"""Float32 logits of two models on one batch stay under this."""
CALIBRATION_TOKENS = 8192
"""Tokens of one calibration batch when its size is `auto`."""


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to, before anything is computed."""

    recipe: Recipe
    model: Model
    draw: Draw
    patterns: dict[str, Pattern]
    notices: list[str]

    @property
    def batch_size(self) -> int:
        size = self.recipe.engine.batch_size
        return size if isinstance(size, int) else max(1, CALIBRATION_TOKENS // self.draw.calibration.shape[1])


def make_plan(recipe: Recipe, token: str | None = None) -> Plan:
    """Opens the model, draws the tokens, gives each matrix its pattern. Writes nothing. Raises InputError."""
    for task in recipe.evaluation:
        if task != "none":
            check_name(task)
    model = open_model(recipe, token)
    pattern = recipe.make_pattern()
    for matrix in model.matrices:
        try:
            pattern.check(*matrix.shape)
        except InputError as error:
            raise InputError(f"{matrix.name}: {error}") from error
    if not model.matrices:
        raise InputError("nothing is left to prune: --skip matches every matrix")
    drawn, notices = draw_tokens(recipe, model)
    if recipe.iters > 1 or recipe.target != "own":
        check_judges(drawn)
    if recipe.iters > 1:
        _ = model.head  # or InputError
    if any(matrix.stored.itemsize > model.dtype.itemsize for matrix in model.matrices):
        notices.append(f"the checkpoint is wider than {model.dtype}: weights of pruned matrices are rounded to it")
    return Plan(recipe, model, drawn, {matrix.name: pattern for matrix in model.matrices}, notices)


def check_judges(drawn: Draw) -> None:
    """Raises InputError when there is nothing held out to judge by."""
    if not len(drawn.heldout):
        raise InputError(
            f"rounds and corrected targets need held-out sequences to judge by, and {drawn.facts['dataset']} has none "
            "left; use more text, a smaller --nsamples, or data.heldout above 0"
        )


def open_model(recipe: Recipe, token: str | None = None) -> Model:
    """The recipe's model on the recipe's device."""
    part = recipe.model
    return load(
        part.name,
        revision=part.revision,
        token=token,
        dtype=part.dtype,
        device=recipe.engine.device,
        blocks=part.blocks,
        skip=recipe.skip,
        trust_remote_code=part.trust_remote_code,
    )


def draw_tokens(recipe: Recipe, model: Model) -> tuple[Draw, list[str]]:
    """Calibration and held-out tokens, and what the user should know about them."""
    part = recipe.data
    notices: list[str] = []
    corpus = open_corpus(part.dataset or default_dataset(recipe.model.name), part.text_column)
    seqlen = fit_length(part.seqlen, model, notices)
    counts = part.nsamples, part.heldout, recipe.seed, recipe.iters
    drawn = draw(corpus, lambda: model.tokenizer, model.vocabulary, seqlen, *counts)
    if drawn.calibration.shape[1] != seqlen:
        notices.append(f"the sequences of {corpus.source} are {drawn.calibration.shape[1]} tokens long, not {seqlen}")
    if len(drawn.heldout) < part.heldout:
        notices.append(f"held-out text: {len(drawn.heldout)} of {part.heldout} sequences; {corpus.source} has no more")
    if not all(drawn.facts.get("rounds", {}).get("fresh", [])):
        notices.append(
            f"{corpus.source} has fewer than {recipe.iters} x {part.nsamples} sequences for its rounds; "
            "later ones get reshuffled ones"
        )
    return drawn, notices


def default_dataset(model: str) -> str:
    """C4, as the papers do; the demo model brings its own text."""
    return str(locate(DEMO) / "calibration.txt") if model == DEMO else DEFAULT_DATASET


def fit_length(seqlen: int, model: Model, notices: list[str]) -> int:
    """The sequence length, cut to what the model was made for."""
    if model.max_length and seqlen > model.max_length:
        notices.append(f"seqlen {seqlen} is more than the model's {model.max_length}; {model.max_length} is used")
        return model.max_length
    return seqlen


def prune(
    recipe: Recipe, output: Path, progress: Progress, force: bool = False, token: str | None = None, command: str = ""
) -> dict[str, Any]:
    """Prunes, evaluates, reports. Returns the report; the sparse checkpoint is in `output`.

    An unfinished run of the same recipe in `output` is continued. Raises InputError before anything is written.
    """
    begin = time.perf_counter()
    run = RunDir.open(output, locate(recipe.model.name, recipe.model.revision, token), force)
    plan = make_plan(recipe, token)
    for notice in plan.notices:
        progress.notice(notice)
    tasks = plan_tasks(plan, progress)
    model, ids = plan.model, plan.draw.calibration
    small = {"input_ids": ids[:1, :64].to(model.device)}
    check_walk(model, small, progress)
    if recipe.iters > 1:
        check_gradients(model, small)
    if run.start(recipe.tree(), run_facts(plan), [block.name for block in model.blocks], bytes_needed(plan)):
        progress.notice(f"continuing the unfinished run in {output}")
    try:
        evaluate(model, tasks, run, "dense", progress)
        prune_once(plan, run, progress)
        if recipe.iters > 1:
            prune_again(plan, run, progress)
    except BaseException:
        run.abandon()
        raise
    run.finish(model.checkpoint, model.rest)
    if tasks:
        evaluate(load(str(output), dtype=recipe.model.dtype, device=recipe.engine.device, blocks=recipe.model.blocks,
                      trust_remote_code=recipe.model.trust_remote_code), tasks, run, "pruned", progress)  # fmt: skip
    report = build_report(
        run, recipe.tree(), plan.model, plan.draw.facts, plan.notices, time.perf_counter() - begin, command
    )
    write_report(run, report)
    run.record("end")
    return report


def bytes_needed(plan: Plan) -> int:
    """Of disk: the result, and where there are rounds the weights of two of them."""
    matrices = sum(rows * columns for rows, columns in (matrix.shape for matrix in plan.model.matrices))
    rounds = 2 * matrices * plan.model.dtype.itemsize if plan.recipe.iters > 1 else 0
    return plan.model.checkpoint.bytes + rounds


def prune_once(plan: Plan, run: RunDir, progress: Progress) -> None:
    """The first round: one shot."""
    if run.recorded("shot") and all(run.committed(block.name) for block in plan.model.blocks):
        return
    start, recipe = time.perf_counter(), plan.recipe
    prune_blocks(plan.model, make_streams(plan), recipe.make_solver(), plan.patterns, run, progress)
    run.record("shot", seconds=time.perf_counter() - start)


def make_streams(plan: Plan) -> Streams:
    """The calibration batches, in the pruned model alone or in the dense one too."""
    recipe, size, device = plan.recipe, plan.batch_size, plan.model.device
    parts = batches(plan.draw.calibration, size, device)
    if recipe.target == "own":
        return OneStream(parts, recipe.engine.true_sequential)
    judges = batches(plan.draw.heldout, size, device)
    return TwoStreams(parts, judges, recipe.solver.get("damping", 0.01), residual=recipe.target == "stream")


def prune_again(plan: Plan, run: RunDir, progress: Progress) -> None:
    """All further rounds; the best one's weights are in `run` afterwards."""
    recipe, model, shot = plan.recipe, plan.model, run.recorded("shot")
    assert shot is not None
    step, tuning = recipe.make_step(), recipe.make_tuning()
    candidates = len(step.sizes(None)) + 1
    place = choose_place(
        model, recipe.rounds.memory, candidates * model.dtype.itemsize + (12 if tuning else 0), run.scratch
    )
    rows = max(1, LOGIT_BYTES // (8 * plan.draw.calibration.shape[1] * model.vocabulary))
    projection = Projection(recipe.make_solver(), plan.patterns)
    with place.opened():
        rounds = Rounds(step, tuning, projection, place, run, progress, min(plan.batch_size, rows))
        rounds(plan.draw.further, plan.draw.heldout, shot["seconds"])


def run_facts(plan: Plan) -> dict[str, Any]:
    """What must not change for a run to be continued: all that decides its bytes."""
    return {
        **{key: value for key, value in plan.recipe.tree().items() if key not in ("evaluation", "rounds")},
        "rounds": {key: value for key, value in plan.recipe.tree()["rounds"].items() if key != "memory"},
        "obsprune": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": str(plan.model.device),
        "dtype": str(plan.model.dtype),
        "calibration_sha256": plan.draw.facts["sha256"],
        "rounds_sha256": [content_hash(rows) for rows in plan.draw.further],
        "heldout_sha256": plan.draw.facts["heldout_sha256"],
        "checkpoint": plan.model.checkpoint.fingerprint(),
    }


def plan_tasks(plan: Plan, progress: Progress) -> list[Task]:
    """The tasks to evaluate; default ones that cannot be had are left out with a notice, asked ones are an error."""
    asked = plan.recipe.evaluation
    if asked == ["none"]:
        return []
    if asked:
        return [make_task(name, plan.model, plan.recipe, plan.draw) for name in asked]
    tasks = []
    for name in ("heldout", "wikitext2"):
        try:
            tasks.append(make_task(name, plan.model, plan.recipe, plan.draw))
        except InputError as error:
            progress.notice(f"evaluation on {name} is left out: {error}")
    return tasks


def make_task(
    name: str,
    model: Model,
    recipe: Recipe,
    drawn: Draw | None = None,
    limit: int | None = None,
    seqlen: int | None = None,
) -> Task:
    """A task by name; `heldout` are the rows that the recipe's own draw kept apart. Raises InputError."""
    if name == "heldout":
        held = (drawn or draw_tokens(recipe, model)[0]).heldout
        return rows_task(name, held, f"kept apart from the calibration data, seed {recipe.seed}", model, limit)
    return text_task(name, model, fit_length(seqlen or recipe.data.seqlen, model, []), limit)


def evaluate(model: Model, tasks: list[Task], run: RunDir, who: str, progress: Progress) -> None:
    """Scores every task that the run has no score of yet."""
    for task in tasks:
        if run.recorded("score", task=task.name, who=who, sha256=task.protocol["sha256"]) is None:
            start = time.perf_counter()
            score = task.score(model, progress, who)
            run.record("score", **{"task": task.name, "who": who, **score, "seconds": time.perf_counter() - start})


def evaluate_checkpoint(
    name: str, names: list[str], progress: Progress, compare: str | None = None, limit: int | None = None, **how: Any
) -> dict[str, Any]:
    """Scores of a checkpoint on tasks, and of another beside it. how: seqlen, dtype, device, revision, token, …

    A directory made by `prune` remembers its recipe: without names, its held-out text is used.
    """
    seqlen = how.pop("seqlen", None)
    for task_name in names:
        check_name(task_name)
    model = load(name, **how)
    recipe = recorded_recipe(model.directory)
    chosen = names or default_tasks(recipe)
    if "heldout" in chosen and recipe is None:
        raise InputError(f"{name} was not made by obsprune and has no held-out text; use --task text=FILE or wikitext2")
    tasks = [make_task(task, model, recipe or make_recipe(), None, limit, seqlen) for task in chosen]
    scores = {task.name: {"model": task.score(model, progress, name)} for task in tasks}
    if compare:
        other = load(compare, **how)
        if other.vocabulary != model.vocabulary:
            raise InputError(
                f"{name} has {model.vocabulary} tokens and {compare} {other.vocabulary}; "
                "perplexities of different tokenizers cannot be compared"
            )
        for task in tasks:
            entry = scores[task.name]
            entry["compare"] = task.score(other, progress, compare)
            entry["ratio"] = entry["model"]["perplexity"] / entry["compare"]["perplexity"]
    return {"model": name, "compare": compare, "tasks": scores}


def default_tasks(recipe: Recipe | None) -> list[str]:
    """What suits a model when no task is named: what its own run was evaluated on, else WikiText-2."""
    if recipe is None:
        return ["wikitext2"]
    return [name for name in recipe.evaluation if name != "none"] or ["heldout"]


def recorded_recipe(directory: Path) -> Recipe | None:
    """The recipe a directory was made by, if obsprune made it."""
    path = directory / RECIPE
    if not path.is_file():
        return None
    try:
        return make_recipe(read_recipe(path))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def describe(plan: Plan) -> dict[str, Any]:
    """A plan as plain values, for machines."""
    return {
        "recipe": plan.recipe.tree(),
        "matrices": [
            {"name": m.name, "shape": m.shape, "zeros": plan.patterns[m.name].pruned(*m.shape)}
            for m in plan.model.matrices
        ],
        "skipped": plan.model.skipped,
        "data": plan.draw.facts,
        "notices": plan.notices,
    }


def inspect_result(directory: Path) -> dict[str, Any]:
    """The report's matrices with the dtype that the files' headers say; no weight is read. Raises InputError."""
    report = read_report(directory)
    checkpoint = Checkpoint.open(directory)
    stored = {(header.dtype, header.shape) for header in checkpoint.headers.values()}
    kinds = {shape: str(dtype).removeprefix("torch.") for dtype, shape in stored}
    matrices = [
        matrix | {"dtype": kinds.get(tuple(matrix["shape"])) or kinds.get(tuple(reversed(matrix["shape"])), "?")}
        for matrix in report["matrices"]
    ]
    return {"output": str(directory), "sparsity": report["sparsity"], "matrices": matrices}
