"""What a recipe comes to before anything is computed: the model, the tokens, every pattern, and what to know first."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from obsprune import __version__
from obsprune.core.patterns import Pattern
from obsprune.engine.layerwise import Projection
from obsprune.engine.streams import OneStream, Streams, TwoStreams
from obsprune.errors import InputError
from obsprune.evaluate.tasks import check_name
from obsprune.models.data import Draw, draw
from obsprune.models.kinds import Kind, Wish
from obsprune.models.load import DEMO, Model, load, locate
from obsprune.recipe import Recipe
from obsprune.recipe_parts import ExpertsPart


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to, before anything is computed."""

    recipe: Recipe
    model: Model
    draw: Draw
    patterns: dict[str, Pattern]
    notices: list[str]

    @property
    def projection(self) -> Projection:
        """How a matrix becomes sparse."""
        return Projection(self.recipe.make_solver(), self.patterns, self.recipe.make_coverage())

    @property
    def batch_size(self) -> int:
        size = self.recipe.engine.batch_size
        return size if isinstance(size, int) else self.draw.calibration.together


def make_plan(recipe: Recipe, token: str | None = None) -> Plan:
    """Opens the model, draws the samples, gives each matrix its pattern. Writes nothing. Raises InputError."""
    for task in recipe.evaluation:
        if task != "none":
            check_name(task)  # before anything is loaded
    model = open_model(recipe, token)
    asked, recipe = recipe, suited(recipe, model.kind)
    patterns = uniform_patterns(recipe, model)
    drawn, notices = draw_samples(recipe, model)
    if recipe.is_judged:
        check_judges(drawn)
    if (recipe.iters > 1 or recipe.rules) and model.kind.positional:
        _ = model.head  # or InputError
    return Plan(recipe, model, drawn, patterns, [*notices, *remarks(recipe, asked, model)])


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
        depthwise=part.depthwise,
        trust_remote_code=part.trust_remote_code,
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


def make_streams(plan: Plan) -> Streams:
    """The calibration batches, in the pruned model alone or in the dense one too."""
    recipe, size, model = plan.recipe, plan.batch_size, plan.model
    if recipe.matching.passes:  # every step of a pass has a batch of its own
        size = min(size, max(1, len(plan.draw.calibration) // recipe.matching.steps))
    parts = model.batches(plan.draw.calibration, size)
    if recipe.target == "own" and not recipe.matching.passes:
        return OneStream(parts, recipe.engine.true_sequential)
    judges = model.batches(plan.draw.heldout, size)
    most = recipe.correction or 0.0 if recipe.target != "own" else 0.0
    return TwoStreams(parts, judges, recipe.solver.get("damping", 0.01), recipe.target == "stream", most)


def bytes_needed(plan: Plan) -> int:
    """Of disk: the result, where there are rounds the weights of two of them, and the trials of an allocation."""
    matrices = sum(rows * columns for rows, columns in (matrix.shape for matrix in plan.model.matrices))
    rounds = 2 * matrices * plan.model.dtype.itemsize if plan.recipe.iters > 1 else 0
    trials = 1 + len(plan.recipe.rules) if plan.recipe.rules else 0
    return (1 + trials) * plan.model.checkpoint.bytes + rounds


def run_facts(plan: Plan) -> dict[str, Any]:
    """What must not change for a run to be continued: all that decides its bytes."""
    return {
        **{key: value for key, value in plan.recipe.tree().items() if key not in ("evaluation", "rounds")},
        "rounds": {key: value for key, value in plan.recipe.tree()["rounds"].items() if key != "memory"},
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
        "device": str(model.device),
        "dtype": str(model.dtype),
        "checkpoint": model.checkpoint.fingerprint(),
    }


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
