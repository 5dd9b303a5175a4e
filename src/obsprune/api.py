"""Python: `import obsprune`, then what the command line does, with a model, a recipe and a solver as objects.

result = obsprune.prune("demo", ["fast", {"sparsity": 0.6}], output="sparse")
result = obsprune.prune(model, "balanced", processor=tokenizer)  # a model in memory, in place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

from obsprune import pipeline
from obsprune.engine.distributed import alone, processes
from obsprune.errors import InputError
from obsprune.models.whole import fill, write_whole
from obsprune.presets import layered, path_of
from obsprune.progress import Progress, Silent
from obsprune.recipe import Recipe
from obsprune.recipe import make_recipe as from_trees
from obsprune.solvers import described
from obsprune.solvers.base import AnySolver
from obsprune.trees import read_recipe

Layer = Recipe | Mapping[str, Any] | Path | str
"""A recipe, a part of one, a YAML file, or the name of a preset."""


@final
@dataclass(frozen=True)
class Result:
    """What a run came to. report: as in report.json; path: of the checkpoint, None where nobody wanted one; model: the
    object that was pruned, None where it was none.
    """

    report: Mapping[str, Any] = field(repr=False)
    path: Path | None
    model: Any = field(default=None, repr=False)

    @property
    def sparsity(self) -> float:
        """The share of zeros in the matrices that were pruned."""
        return float(self.report["sparsity"]["reached"])

    @property
    def scores(self) -> dict[str, Any]:
        """{task: {dense: score, pruned: score, their paired difference}}."""
        return dict(self.report["evaluation"])


def make_recipe(*layers: Layer) -> Recipe:
    """One recipe from layers of growing priority; the default preset lies below where none of them names a solver.

    Raises InputError for what is no recipe.
    """
    return from_trees(*layered(None, {}, *map(_tree, layers)))


def prune(
    model: Any,
    recipe: Layer | Sequence[Layer] | None = None,
    *,
    output: str | Path | None = None,
    processor: Any = None,
    solver: AnySolver | None = None,
    force: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Prunes a model and evaluates it before and after, as `obsprune prune` does.

    model: `demo`, a directory, a Hugging Face id, or a transformers model in memory, whose weights are replaced;
    recipe: one, or layers of one (make_recipe); output: where the checkpoint goes, which only a model in memory can do
    without; processor: tokenizer or image processor of a model in memory; solver:
    one of your own, instead of the recipe's; force: a former result in `output` is deleted; token: of the hub.

    A model in memory is first written to a temporary directory, and so, without `output`, is its result. An unfinished
    run of the same recipe in `output` is continued, but not of a model in memory. Several processes (torchrun) share
    the work on a checkpoint. Raises InputError before anything is written; then the model is as it was.
    """
    layers: Sequence[Any] = recipe if isinstance(recipe, list | tuple) else [] if recipe is None else [recipe]
    asked = make_recipe(*layers) if solver is None else _with(solver, layers)
    watch = progress or Silent()
    path = Path(output).expanduser() if output else None
    if isinstance(model, str | Path):
        if path is None:
            raise InputError(f"nobody said where the sparse {model} goes: prune(..., output=DIRECTORY)")
        with processes() as ranks:
            report = pipeline.prune(_of(str(model), asked), path, watch, force, token, ranks=ranks, solver=solver)
        return Result(report, path)
    alone("pruning a model in memory")
    with TemporaryDirectory() as scratch:
        dense, sparse = Path(scratch) / type(model).__name__, path or Path(scratch) / "sparse"
        write_whole(model, processor, dense)
        report = pipeline.prune(_of(str(dense), asked), sparse, watch, force, token, solver=solver)
        fill(model, sparse)
    return Result(report, path, model)


def _with(solver: AnySolver, layers: Sequence[Layer]) -> Recipe:
    """A recipe whose solver is a caller's own; as any solver that is named, it is no part of the default preset."""
    return replace(make_recipe({"solver": {"name": "magnitude"}}, *layers), solver=described(solver))


def _of(name: str, recipe: Recipe) -> Recipe:
    return replace(recipe, model=replace(recipe.model, name=name))


def _tree(layer: Layer) -> Mapping[str, Any]:
    """The plain values of a layer. Raises InputError."""
    if isinstance(layer, Recipe):
        return layer.tree()
    if isinstance(layer, Mapping):
        return layer
    if not isinstance(layer, str | Path):
        raise InputError(f"{layer!r} is no recipe; a preset's name, a YAML file's path or a mapping is expected")
    is_file = isinstance(layer, Path) or layer.endswith((".yaml", ".yml"))
    return read_recipe(Path(layer) if is_file else path_of(str(layer)))
