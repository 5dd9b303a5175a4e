"""What was asked: one frozen tree of plain values from defaults, a YAML file and flags, written out into every run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from obsprune.core.patterns import NofM, Pattern, PerRow, Unstructured
from obsprune.engine.allocation import RULES
from obsprune.engine.coverage import POLICIES, Coverage
from obsprune.engine.finetune import Tuning
from obsprune.engine.matching import Matching
from obsprune.engine.place import MEMORIES
from obsprune.engine.steps import Local, Newton, Step
from obsprune.errors import InputError, nearest
from obsprune.models.activations import ACTIVATIONS
from obsprune.recipe_parts import AllocationPart, DataPart, EnginePart, ExpertsPart, MatchingPart, ModelPart, RoundsPart
from obsprune.solvers import build, options
from obsprune.solvers.base import AnySolver
from obsprune.trees import Tree, fits, merge, typed


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result. `solver` is a name and its options (obsprune.solvers.options).

    target: what a layer is asked for: its `own` output on the inputs it gets in the pruned model, or, `corrected`, the
    output of the dense model's layer; `stream` makes up for the drift of the residual stream too. correction: how far
    it is moved toward that at most, in [0, 1]; without a number, what suits the kind of model: 0.75 for text, 0.35 for
    images. format: of the result, `dense` (zeros are stored) or `packed` (as `obsprune pack` writes it).
    """

    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    solver: Tree = field(default_factory=lambda: {"name": "sparsegpt"})
    pattern: str | None = None
    sparsity: float | None = None
    allocation: AllocationPart = field(default_factory=AllocationPart)
    target: str = "own"
    correction: float | None = None
    matching: MatchingPart = field(default_factory=MatchingPart)
    iters: int = 1
    rounds: RoundsPart = field(default_factory=RoundsPart)
    experts: ExpertsPart = field(default_factory=ExpertsPart)
    skip: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)
    format: str = "dense"
    engine: EnginePart = field(default_factory=EnginePart)
    seed: int = 0

    def tree(self) -> Tree:
        """As nested plain values, for YAML and JSON."""
        return dataclasses.asdict(self)

    def make_solver(self) -> AnySolver:
        """The solver with its options."""
        given = dict(self.solver)
        return build(given.pop("name"), given)

    def make_step(self) -> Step:
        """The step of a round."""
        return STEPS[self.rounds.step](self.rounds)

    def make_tuning(self) -> Tuning | None:
        """The fine-tuning pass of a round."""
        part = self.rounds
        return Tuning(part.steps, part.tune == "masked", part.passes) if part.tune != "none" else None

    def make_matching(self) -> Matching | None:
        """What is done with each pruned block."""
        return Matching(self.matching.passes, self.matching.rate) if self.matching.passes else None

    def make_coverage(self) -> Coverage:
        """What becomes of experts that too few tokens reach."""
        return Coverage(POLICIES[self.experts.starved], self.experts.fewest)

    def make_pattern(self) -> Pattern:
        """The pattern every matrix must meet."""
        assert self.pattern is not None
        assert self.sparsity is not None  # `resolve` has set both
        if self.pattern in SHARES:
            return SHARES[self.pattern](self.sparsity)
        return parse_n_of_m(self.pattern)

    @property
    def rules(self) -> list[str]:
        """The rules of allocation that apply at this sparsity and pattern."""
        assert self.sparsity is not None
        applies = self.pattern == "unstructured" and self.sparsity >= self.allocation.least
        return self.allocation.rules if applies else []

    @property
    def is_judged(self) -> bool:
        """Whether held-out sequences decide anything."""
        return self.iters > 1 or self.target != "own" or self.matching.passes > 0 or bool(self.rules)

    @property
    def label(self) -> str:
        """What is done, in a file name: sparsegpt-50, wanda-row-60, sparsegpt-2of4."""
        assert self.pattern is not None
        assert self.sparsity is not None
        percent = f"{100 * self.sparsity:.4g}"
        what = {"unstructured": percent, "row": f"row-{percent}"}.get(self.pattern, self.pattern.replace(":", "of"))
        options = self.solver
        refit = f"-refit{options['refit']}" if options["refit"] else "-exact" if options["exact"] else ""
        refit += "-compensated" if options["compensate"] else ""
        target = f"-{self.target}" if self.target != "own" else ""
        matched = "-matched" if self.matching.passes else ""
        shared = f"-{'-'.join(self.rules)}" if self.rules else ""
        rounds = f"-iters{self.iters}" if self.iters > 1 else ""
        return f"{options['name']}{refit}{target}{matched}{shared}-{what}{rounds}"


TARGETS = ("own", "corrected", "stream")
FORMATS = ("dense", "packed")
TUNES = ("masked", "free", "none")
STEPS: dict[str, Callable[[RoundsPart], Step]] = {
    "newton": lambda part: Newton(part.damping),
    "local": lambda part: Local(),
    "none": lambda part: Newton(part.damping, moves=False),
}
SHARES: dict[str, type[Unstructured] | type[PerRow]] = {"unstructured": Unstructured, "row": PerRow}
DEFAULT_SPARSITY = 0.5
DEFAULT_DATASET = "c4"


def parse_n_of_m(text: str) -> NofM:
    """`2:4` -> 2 kept of every 4. Raises InputError."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise InputError(f"unknown pattern '{text}'; known: {', '.join(SHARES)}, n:m such as 2:4 (2 kept of every 4)")
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise InputError(f"pattern {text} keeps {n} of every {m}: n must be at least 1 and less than m")
    return NofM(n, m)


def make_recipe(*trees: Mapping[str, Any]) -> Recipe:
    """One recipe from trees of growing priority, checked and with every default written out. Raises InputError."""
    recipe: Recipe = typed(Recipe, merge({"solver": {"name": "sparsegpt"}}, *trees), "")
    return _resolve(recipe)


def _resolve(recipe: Recipe) -> Recipe:
    """Fills in what depends on something else, and refuses what cannot be."""
    _check_numbers(recipe)
    _check_rounds(recipe.rounds)
    _check_allocation(recipe.allocation)
    _check_experts(recipe.experts.starved, recipe.allocation)
    _check_target(recipe.target, recipe.correction)
    if recipe.format not in FORMATS:
        raise InputError(f"format is '{recipe.format}'; {nearest(recipe.format, FORMATS)}")
    if not 0 < recipe.matching.rate < math.inf:
        raise InputError(f"matching.rate is {recipe.matching.rate!r}; a positive number is expected")
    if "none" in recipe.evaluation and len(recipe.evaluation) > 1:
        raise InputError(f"'none' among the tasks {', '.join(recipe.evaluation)}: drop it, or the others")
    for expression in [*recipe.skip, recipe.model.blocks or ""]:
        _check_expression(expression)
    solver = _solver_options(recipe.solver)
    pattern = recipe.pattern or ("row" if solver["name"] == "wanda" else "unstructured")  # wanda as published
    return dataclasses.replace(recipe, solver=solver, pattern=pattern, sparsity=_sparsity(pattern, recipe.sparsity))


def _check_numbers(recipe: Recipe) -> None:
    for name, value, least in (
        ("--iters", recipe.iters, 1),
        ("matching.passes", recipe.matching.passes, 0),
        ("matching.steps", recipe.matching.steps, 1),
        ("rounds.steps", recipe.rounds.steps, 1),
        ("rounds.passes", recipe.rounds.passes, 1),
        ("rounds.patience", recipe.rounds.patience, 1),
        ("--nsamples", 1 if recipe.data.nsamples is None else recipe.data.nsamples, 1),
        ("--seqlen", recipe.data.seqlen, 2),
        ("data.heldout", recipe.data.heldout or 0, 0),
        ("experts.fewest", recipe.experts.fewest or 0, 0),
        ("--seed", recipe.seed, 0),
    ):
        if not least <= value < 2**63:
            raise InputError(f"{name} {value}: a number from {least} to 2^63 - 1 is expected")
    if recipe.engine.activations not in ACTIVATIONS:
        raise InputError(
            f"--activations {recipe.engine.activations}; {nearest(recipe.engine.activations, ACTIVATIONS)}"
        )
    size = recipe.engine.batch_size
    if size != "auto" and not (isinstance(size, int) and size > 0):
        raise InputError(f"--batch-size {size}: a positive number or 'auto' is expected")


def _check_allocation(part: AllocationPart) -> None:
    for rule in part.rules:
        if rule not in RULES:
            raise InputError(f"allocation.rules names '{rule}'; {nearest(rule, RULES)}")
    if len(set(part.rules)) < len(part.rules):
        raise InputError(f"allocation.rules names a rule twice: {', '.join(part.rules)}")
    if not 0 <= part.least <= 1:
        raise InputError(f"allocation.least is {part.least:g}; a sparsity between 0 and 1 is expected")


def _check_experts(starved: str, allocation: AllocationPart) -> None:
    if starved not in POLICIES:
        raise InputError(f"experts.starved is '{starved}'; {nearest(starved, POLICIES)}")
    if not POLICIES[starved].prunes and allocation.rules:
        raise InputError(
            f"experts.starved={starved} leaves experts dense that are known only when the zeros are shared out; with "
            "it set allocation.rules=[]"
        )


def _check_target(target: str, correction: float | None) -> None:
    if target not in TARGETS:
        raise InputError(f"target is '{target}'; {nearest(target, TARGETS)}")
    if correction is not None and not 0 <= correction <= 1:
        raise InputError(f"correction is {correction:g}; a share from 0 to 1 is expected")


def _check_rounds(part: RoundsPart) -> None:
    for name, value, known in (
        ("tune", part.tune, TUNES),
        ("step", part.step, STEPS),
        ("memory", part.memory, MEMORIES),
    ):
        if value not in known:
            raise InputError(f"rounds.{name} is '{value}'; {nearest(value, known)}")
    if not 0 <= part.damping < math.inf:
        raise InputError(f"rounds.damping is {part.damping!r}; a number from 0 up is expected")


def _sparsity(pattern: str, given: float | None) -> float:
    if given is not None and not 0 <= given < 1:
        hint = f"; {given:g} % is --sparsity {given / 100:g}" if 2 <= given < 100 else ""
        raise InputError(f"--sparsity {given:g} is outside [0, 1){hint}")
    if pattern in SHARES:
        return DEFAULT_SPARSITY if given is None else given
    kept = parse_n_of_m(pattern)
    implied = 1 - kept.n / kept.m
    if given is not None and abs(given - implied) > 1e-9:
        raise InputError(
            f"--pattern {pattern} means sparsity {implied:g}, which --sparsity {given:g} contradicts; drop one"
        )
    return implied


def _solver_options(given: Tree) -> Tree:
    """Name and all options of the solver, with their defaults; unknown or ill-typed ones are refused."""
    name = str(given.get("name"))
    known = options(name)
    for key, value in given.items():
        if key != "name" and key not in known:
            raise InputError(f"solver {name} has no option '{key}'; {nearest(key, known)}")
        if key != "name" and not fits(value, type(known[key])):
            raise InputError(f"solver.{key} is {value!r}; a {type(known[key]).__name__} is expected")
        if key != "name" and not 0 <= value < math.inf:
            raise InputError(f"solver.{key} is {value!r}; a number from 0 up is expected")
    if given.get("blocksize", 1) < 1:
        raise InputError("solver.blocksize is 0; at least one column is needed")
    if given.get("exact") and given.get("refit"):
        raise InputError("solver.exact and solver.refit exclude each other; set solver.refit=0")
    return {"name": name, **known, **given}


def _check_expression(expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise InputError(f"'{expression}' is not a regular expression: {error}") from error
