"""What a recipe comes to before anything is computed: the model, the tokens, every pattern, and what to know first."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from obsprune import __version__
from obsprune.core.patterns import Pattern
from obsprune.core.targets import MOST
from obsprune.engine.streams import OneStream, Streams, TwoStreams
from obsprune.errors import InputError
from obsprune.evaluate.tasks import check_name
from obsprune.models.data import Draw, batches, content_hash, draw, open_corpus
from obsprune.models.load import DEMO, Model, load, locate
from obsprune.recipe import DEFAULT_DATASET, Recipe

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
    patterns = uniform_patterns(recipe, model)
    drawn, notices = draw_tokens(recipe, model)
    if recipe.is_judged:
        check_judges(drawn)
    if recipe.iters > 1 or recipe.rules:
        _ = model.head  # or InputError
    return Plan(recipe, model, drawn, patterns, [*notices, *remarks(recipe, model)])


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


def remarks(recipe: Recipe, model: Model) -> list[str]:
    """Notices: what was asked for and does not apply, or costs precision."""
    notices = {
        f"all matrices get the same share of zeros: allocation is for unstructured from {recipe.allocation.least:g} up":
            bool(recipe.allocation.rules) and not recipe.rules,
        "solver.compensate does nothing: no layer to prune has a bias":
            recipe.solver["compensate"] and all(matrix.bias is None for matrix in model.matrices),
        f"the checkpoint is wider than {model.dtype}: weights of pruned matrices are rounded to it":
            any(matrix.stored.itemsize > model.dtype.itemsize for matrix in model.matrices),
    }  # fmt: skip
    return [notice for notice, applies in notices.items() if applies]


def check_judges(drawn: Draw) -> None:
    """Raises InputError when there is nothing held out to judge by."""
    if not len(drawn.heldout):
        raise InputError(
            "rounds, corrected targets, matching and allocation are judged by held-out sequences, and there are none: "
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


def make_streams(plan: Plan) -> Streams:
    """The calibration batches, in the pruned model alone or in the dense one too."""
    recipe, size, device = plan.recipe, plan.batch_size, plan.model.device
    if recipe.matching.passes:  # every step of a pass has a batch of its own
        size = min(size, max(1, len(plan.draw.calibration) // recipe.matching.steps))
    parts = batches(plan.draw.calibration, size, device)
    if recipe.target == "own" and not recipe.matching.passes:
        return OneStream(parts, recipe.engine.true_sequential)
    judges = batches(plan.draw.heldout, size, device)
    most = MOST if recipe.target != "own" else 0.0
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
