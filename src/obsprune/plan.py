"""What a recipe comes to before anything is computed: the model, the tokens, every pattern, and what to know first."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch

from obsprune import __version__
from obsprune.core.patterns import Pattern
from obsprune.engine.layerwise import Projection
from obsprune.engine.streams import OneStream, Streams, TwoStreams
from obsprune.errors import InputError
from obsprune.evaluate.task import Task
from obsprune.evaluate.tasks import Setting, check_name, make_task
from obsprune.models.checkpoint import CONFIG
from obsprune.models.data import Draw, draw
from obsprune.models.kinds import Kind, Wish
from obsprune.models.load import DEMO, Model, load, locate
from obsprune.models.samples import Samples
from obsprune.ranks import ALONE, Ranks
from obsprune.recipe import Recipe
from obsprune.recipe_parts import ExpertsPart
from obsprune.solvers.base import AnySolver

LOGIT_BYTES = 2**29
"""Float32 logits of two models on one batch stay under this."""


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to, before anything is computed. solver: the recipe's, or a caller's own; opening, drawing:
    seconds it took to open the model and to draw the samples; efforts: what each block costs beside the others, once
    that is known.
    """

    recipe: Recipe
    model: Model
    draw: Draw
    solver: AnySolver
    patterns: dict[str, Pattern]
    notices: list[str]
    opening: float = 0.0
    drawing: float = 0.0
    efforts: Sequence[float] = ()

    @property
    def projection(self) -> Projection:
        """How a matrix becomes sparse."""
        return Projection(self.solver, self.patterns, self.recipe.make_coverage())

    @property
    def batch_size(self) -> int:
        """Samples that all processes have in one forward together."""
        size = self.recipe.engine.batch_size
        return self.model.ranks.size * (size if isinstance(size, int) else self.draw.calibration.together)

    @property
    def has_two_streams(self) -> bool:
        """Whether the dense model's calibration walks beside the pruned one's."""
        return self.recipe.target != "own" or self.recipe.matching.passes > 0

    @property
    def stream_size(self) -> int:
        """Samples of one calibration batch of all processes; every step of a matching pass has one of its own."""
        steps = self.recipe.matching.steps if self.recipe.matching.passes else 1
        return min(self.batch_size, max(1, len(self.draw.calibration) // steps))

    @property
    def judged_at_once(self) -> int:
        """Samples of one forward of all processes together where the logits of two models are wanted."""
        size = max(1, LOGIT_BYTES // (8 * self.draw.calibration.positions * self.model.classes))
        return min(self.batch_size, self.model.ranks.size * size)

    @property
    def lesson_size(self) -> int:
        """Samples of one batch of a round: every step of a fine-tuning pass has a batch of its own."""
        tuning, size = self.recipe.make_tuning(), self.judged_at_once
        return min(size, max(1, len(self.draw.calibration) // tuning.steps)) if tuning else size

    @property
    def bytes_a_weight(self) -> int:
        """What a round's stores hold for each prunable weight at most."""
        candidates = len(self.recipe.make_step().sizes(None)) + 1
        return candidates * self.model.dtype.itemsize + (12 if self.recipe.make_tuning() else 0)


def make_plan(recipe: Recipe, token: str | None = None, ranks: Ranks = ALONE, solver: AnySolver | None = None) -> Plan:
    """Opens the model, draws the samples, gives each matrix its pattern. Writes nothing. Raises InputError.

    solver: a caller's own, which the recipe describes but cannot make.
    """
    return ranks.agree(lambda: _planned(recipe, token, ranks, solver))


def _planned(recipe: Recipe, token: str | None, ranks: Ranks, solver: AnySolver | None) -> Plan:
    for task in recipe.evaluation:
        if task != "none":
            check_name(task)  # before anything is loaded
    start = time.perf_counter()
    model = open_model(recipe, token, ranks)
    opened = time.perf_counter()
    asked, recipe = recipe, suited(recipe, model.kind)
    patterns = uniform_patterns(recipe, model)
    drawn, notices = draw_samples(recipe, model)
    seconds = opened - start, time.perf_counter() - opened
    if recipe.is_judged:
        check_judges(drawn)
    for samples in filter(len, (drawn.calibration, drawn.heldout)):
        ranks.mine(len(samples))  # or InputError
    if (recipe.iters > 1 or recipe.rules) and model.kind.positional:
        _ = model.head  # or InputError
    solver = solver or recipe.make_solver()
    plan = Plan(recipe, model, drawn, solver, patterns, [*notices, *remarks(recipe, asked, model)], *seconds)
    plan.notices.extend(fewer_steps(plan))
    return plan


def suited(recipe: Recipe, kind: Kind) -> Recipe:
    """The recipe with the numbers that suit the kind of model where none were given."""
    data = recipe.data
    nsamples = kind.nsamples if data.nsamples is None else data.nsamples
    heldout = kind.heldout if data.heldout is None else data.heldout
    free = recipe.correction is None and recipe.target != "own"
    correction = kind.correction if free else recipe.correction
    return replace(recipe, data=replace(data, nsamples=nsamples, heldout=heldout), correction=correction)


def uniform_patterns(recipe: Recipe, model: Model) -> dict[str, Pattern]:
    """The recipe's pattern for every matrix. Raises InputError when one cannot obey it, or there is none."""
    if not model.matrices:
        raise InputError("nothing is left to prune: --skip matches every matrix")
    pattern = recipe.make_pattern()
    for matrix in model.matrices:
        try:
            pattern.check(*matrix.shape)
        except InputError as error:
            raise InputError(f"{matrix.name}: {error}") from error
    return {matrix.name: pattern for matrix in model.matrices}


def fewer_steps(plan: Plan) -> list[str]:
    """A notice where so many processes leave fewer optimizer steps than one would make: each takes a sample of all."""
    count, ranks, recipe = len(plan.draw.calibration), plan.model.ranks, plan.recipe
    sizes = {"matching": plan.stream_size} if recipe.matching.passes else {}
    sizes |= {"a round's fine-tuning": plan.lesson_size} if recipe.iters > 1 and recipe.make_tuning() else {}
    found = {
        what: (-(-count // size), -(-len(ranks.mine(count)) // ranks.part(count, size))) for what, size in sizes.items()
    }
    return [
        f"{what} makes {here} optimizer steps a pass in {ranks.size} processes and {alone} in one; give more --nsamples"
        for what, (alone, here) in found.items()
        if here < alone
    ]


def remarks(recipe: Recipe, asked: Recipe, model: Model) -> list[str]:
    """Notices: what was asked for and does not apply, or costs precision."""
    notices = {
        f"all matrices get the same share of zeros: allocation is for unstructured from {recipe.allocation.least:g} up":
            bool(recipe.allocation.rules) and not recipe.rules,
        "correction does nothing: the target is a layer's own output": asked.correction is not None
            and recipe.target == "own",
        "engine.reestimate_norms does nothing: no batch norm in the blocks": recipe.engine.reestimate_norms
            and not any(block.statistics for block in model.blocks),
        "solver.compensate does nothing: no layer to prune has a bias":
            recipe.solver["compensate"] and all(matrix.bias is None for matrix in model.matrices),
        "experts.starved and experts.fewest do nothing: no mixture of experts": recipe.experts != ExpertsPart()
            and not any(block.experts for block in model.blocks),
        f"the checkpoint is wider than {model.dtype}: weights that pruning changes are rounded to it":
            any(matrix.stored.itemsize > model.dtype.itemsize for matrix in model.matrices),
    }  # fmt: skip
    return [notice for notice, applies in notices.items() if applies]


def check_judges(drawn: Draw) -> None:
    """Raises InputError when there is nothing held out to judge by."""
    if not len(drawn.heldout):
        raise InputError(
            f"rounds, corrected targets, matching and allocation are judged by held-out {drawn.heldout.unit}, "
            "and there are none: "
            f"set data.heldout above 0, and keep it and --nsamples within what {drawn.facts['dataset']} has"
        )


def open_model(recipe: Recipe, token: str | None = None, ranks: Ranks = ALONE) -> Model:
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
        depthwise=part.depthwise,
        trust_remote_code=part.trust_remote_code,
        ranks=ranks,
    )


def draw_samples(recipe: Recipe, model: Model) -> tuple[Draw, list[str]]:
    """Calibration and held-out samples, and what the user should know about them. Raises InputError."""
    part = recipe.data
    assert part.nsamples is not None
    assert part.heldout is not None  # `suited` has set both
    source, notices = model.open(Wish(part.dataset or default_dataset(recipe, model), part.seqlen, part.text_column))
    drawn = draw(source, part.nsamples, part.heldout, recipe.seed, recipe.iters)
    notices += source.notices()
    if len(drawn.heldout) < part.heldout:
        notices.append(
            f"held out: {len(drawn.heldout)} of {part.heldout} {drawn.heldout.unit}; {source.name} has no more"
        )
    if not all(drawn.facts.get("rounds", {}).get("fresh", [])):
        notices.append(
            f"{source.name} has fewer than {recipe.iters} x {part.nsamples} {drawn.heldout.unit} for its rounds; "
            "later ones get reshuffled ones"
        )
    return drawn, notices


def default_dataset(recipe: Recipe, model: Model) -> str:
    """C4, as the papers do; the demo model brings its own text. Raises InputError for a classifier."""
    if recipe.model.name == DEMO:
        return str(locate(DEMO) / "calibration.txt")
    if model.kind.dataset is None:
        raise InputError(
            f"a {model.config.model_type} model is calibrated with images: --dataset imagenet=PATH "
            "(a folder of images, a tree with a folder for each class, or a labels file: path, class)"
        )
    return model.kind.dataset


def make_streams(plan: Plan, batches: int | None = None) -> Streams:
    """The calibration batches (or so many of the first), in the pruned model alone or in the dense one too."""
    recipe, size, model, draw = plan.recipe, plan.stream_size, plan.model, plan.draw
    parts = model.shared(_first(draw.calibration, batches and batches * size), size)
    if not plan.has_two_streams:
        return OneStream(parts, recipe.engine.true_sequential, model.ranks)
    share = len(draw.heldout) / len(draw.calibration)
    judges = model.shared(_first(draw.heldout, batches and math.ceil(share * batches) * size), size)
    most = recipe.correction or 0.0 if recipe.target != "own" else 0.0
    return TwoStreams(parts, judges, recipe.solver.get("damping", 0.01), recipe.target == "stream", most, model.ranks)


def _first(samples: Samples, count: int | None) -> Samples:
    return samples if count is None else samples.take(range(min(count, len(samples))))


def make_tasks(plan: Plan) -> tuple[list[Task], list[str]]:
    """The tasks to evaluate, and notices of default ones that cannot be had. Raises InputError for an asked one."""
    asked = plan.recipe.evaluation
    if asked == ["none"]:
        return [], []
    setting = Setting(plan.model, plan.recipe.data.seqlen, lambda: kept_apart(plan.recipe, plan.draw))
    if asked:
        return [make_task(name, setting) for name in asked], []
    tasks, notices = [], []
    for name in plan.model.kind.tasks:
        try:
            tasks.append(make_task(name, setting))
        except InputError as error:
            notices.append(f"evaluation on {name} is left out: {error}")
    return tasks, notices


def kept_apart(recipe: Recipe, draw: Draw) -> tuple[Samples, str]:
    """The held-out samples, and how they came about."""
    return draw.heldout, f"kept apart from the calibration data, seed {recipe.seed}"


def bytes_needed(plan: Plan) -> int:
    """Of disk: the result, where there are rounds the weights of two of them, or three where the best one waits, the
    iterate that is scored, and the trials of an allocation; or the result twice, where it is packed at the end.
    """
    matrices = sum(rows * columns for rows, columns in (matrix.shape for matrix in plan.model.matrices))
    recipe, part = plan.recipe, plan.recipe.rounds
    rounds = (3 if part.patience > 1 else 2) * matrices * plan.model.dtype.itemsize if recipe.iters > 1 else 0
    trials = 1 + len(recipe.rules) if recipe.rules else 0
    scored = recipe.iters > 1 and part.scored
    result = plan.model.checkpoint.bytes
    packing = result if recipe.format == "packed" else 0  # at most: dense and packed files are there together
    return max((1 + trials + scored) * result + rounds, result + packing)


WHERE = (("rounds", "memory"), ("engine", "activations"))
"""Settings that say where something lives and change no byte of the result."""


def run_facts(plan: Plan) -> dict[str, Any]:
    """What must not change for a run to be continued: all that decides its bytes."""
    tree = {key: value for key, value in plan.recipe.tree().items() if key != "evaluation"}
    for part, name in WHERE:
        tree[part] = {key: value for key, value in tree[part].items() if key != name}
    return {
        **tree,
        **machine_facts(plan.model),
        "calibration_sha256": plan.draw.facts["sha256"],
        "rounds_sha256": [samples.content_hash() for samples in plan.draw.further],
        "heldout_sha256": plan.draw.facts["heldout_sha256"],
    }


def machine_facts(model: Model) -> dict[str, Any]:
    """What decides a run's bytes beside recipe and samples."""
    return {
        "obsprune": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": model.device.type,  # any of them, and any number
        "dtype": str(model.dtype),
        "config": sha256((model.checkpoint.directory / CONFIG).read_bytes()).hexdigest(),
        "checkpoint": model.checkpoint.fingerprint(),
    }
