"""The rules of the house, read from the syntax tree of every module: who may import what, and who may ask for a type.

Each rule turns a module into a list of its violations. Every rule is also shown a module that breaks it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[1] / "src" / "obsprune"

ROOMS = [
    "errors",
    "progress",
    "ranks",
    "core",
    "kernels",
    "solvers",
    "models",
    "engine",
    "evaluate",
    "report",
    "trees",
    "recipe_parts",
    "recipe",
    "training_recipe",
    "finetune_recipe",
    "presets",
    "plan",
    "resources",
    "forecast",
    "outlook",
    "pipeline",
    "eval_pipeline",
    "train_pipeline",
    "finetune_pipeline",
    "api",
    "bench",
    "studies",
    "cli",
]
"""A room may import itself and those before it."""

STRANGERS = {frozenset({"engine", "evaluate"})}
"""Pairs of rooms that do not know each other, in either direction."""

PLAIN = {"core": {"torch"}, "kernels": {"torch", "triton"}, "solvers": {"torch"}}
"""Rooms of pure mathematics, and all they may import besides the standard library, errors and each other."""

OWNED = {
    "transformers": "models/",
    "accelerate": "models/",
    "datasets": "models/",
    "tokenizers": "models/",
    "torch.distributed": "engine/distributed.py",
    "jinja2": "report/",
    "matplotlib": "report/",
    "optuna": "studies/",
    "typer": "cli/",
    "rich": "cli/",
}
"""Library -> the only place that may import it."""

CONTAINERS = {"Module", "ModuleList", "ModuleDict", "Sequential", "ParameterList", "ParameterDict", "Container"}
LAYERS = {
    name for name, kind in vars(torch.nn).items() if isinstance(kind, type) and issubclass(kind, torch.nn.Module)
} - CONTAINERS | {"Conv1D", "_ConvNd"}


@dataclass(frozen=True)
class Module:
    """One file: its path below src/obsprune and its syntax tree."""

    path: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.path.partition("/")[0].removesuffix(".py")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    def package(self, level: int) -> str:
        """The package that `level` leading dots mean here."""
        parts = ["obsprune", *self.path.split("/")[:-1]]
        return ".".join(parts[: len(parts) - level + 1])

    def imports(self) -> Iterator[str]:
        """Full dotted names, those inside functions and under TYPE_CHECKING too."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = self.package(node.level) if node.level else ""
                base = ".".join(part for part in (start, node.module) if part)
                yield from (f"{base}.{alias.name}" for alias in node.names)


def parse(path: str, text: str) -> Module:
    return Module(path, ast.parse(text, filename=path))


@cache
def house() -> list[Module]:
    """All files, parsed once for all rules."""
    return [parse(file.relative_to(SOURCE).as_posix(), file.read_text()) for file in sorted(SOURCE.rglob("*.py"))]


def rooms_imported(module: Module) -> set[str]:
    names = [name.split(".") for name in module.imports()]
    return {parts[1] for parts in names if parts[0] == "obsprune" and len(parts) > 1 and parts[1] in ROOMS}


def within(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}.")


# ------------------------------------------------------------------------------------------------ the rules


def lives_in_a_room(module: Module) -> list[str]:
    return [] if module.room in [*ROOMS, "__init__", "__main__"] else [f"{module.path} is in no room of the list"]


def imports_go_up_the_list(module: Module) -> list[str]:
    # The package itself imports no room: whoever imports one file must not pay for all.
    last = {"__init__": -1, "__main__": len(ROOMS)}
    own = last[module.room] if module.room in last else ROOMS.index(module.room) if module.room in ROOMS else -1
    return [f"{module.path} imports {room}" for room in rooms_imported(module) if ROOMS.index(room) > own]


def strangers_stay_strangers(module: Module) -> list[str]:
    return [
        f"{module.path} imports {room}"
        for room in rooms_imported(module)
        if frozenset({module.room, room}) in STRANGERS
    ]


def mathematics_is_plain(module: Module) -> list[str]:
    if module.room not in PLAIN:
        return []
    welcome = PLAIN[module.room] | sys.stdlib_module_names | {f"obsprune.{room}" for room in ("errors", *PLAIN)}
    return [
        f"{module.path} imports {name}"
        for name in module.imports()
        if not any(within(name, library) for library in welcome)
    ]


def libraries_have_one_owner(module: Module) -> list[str]:
    used = [*module.imports(), *(ast.unparse(node) for node in module.nodes if isinstance(node, ast.Attribute))]
    return [
        f"{module.path} uses {library}"
        for library, owner in OWNED.items()
        if not module.path.startswith(owner) and any(within(name, library) for name in used)
    ]


def types_asked_for(module: Module) -> set[str]:
    """Last names of the types in isinstance, issubclass, `case Kind():` and `type(x) is Kind`."""
    asked: list[ast.AST] = []
    for node in module.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            asked += node.args[1:] if node.func.id in ("isinstance", "issubclass") else []
        elif isinstance(node, ast.MatchClass):
            asked.append(node.cls)
        elif isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
            asked += node.comparators
    # KINDS = (Linear, Conv2d) somewhere, isinstance(x, KINDS) elsewhere: look one name deep.
    named = {
        target.id: node.value
        for node in module.nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    asked += [named[name] for name in set(map(last_name, walk_all(asked))) if name in named]
    return set(map(last_name, walk_all(asked)))


def walk_all(nodes: list[ast.AST]) -> Iterator[ast.AST]:
    for node in nodes:
        yield from ast.walk(node)


def last_name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def layer_kinds_are_asked_in_one_file(module: Module) -> list[str]:
    if module.path == "models/matrices.py":
        return []
    return [f"{module.path} asks for {kind}" for kind in sorted(types_asked_for(module) & LAYERS)]


def patterns() -> set[str]:
    file = next(module for module in house() if module.path == "core/patterns.py")
    return {node.name for node in file.tree.body if isinstance(node, ast.ClassDef)}


def nobody_asks_which_pattern(module: Module) -> list[str]:
    return [f"{module.path} asks for {kind}" for kind in sorted(types_asked_for(module) & patterns())]


def only_the_cli_prints(module: Module) -> list[str]:
    if module.room == "cli":
        return []
    calls = [node for node in module.nodes if isinstance(node, ast.Call)]
    return [f"{module.path}:{call.lineno} prints" for call in calls if last_name(call.func) == "print"]


Rule = Callable[[Module], list[str]]
RULES: list[Rule] = [
    lives_in_a_room,
    imports_go_up_the_list,
    strangers_stay_strangers,
    mathematics_is_plain,
    libraries_have_one_owner,
    layer_kinds_are_asked_in_one_file,
    nobody_asks_which_pattern,
    only_the_cli_prints,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule: Rule) -> None:
    assert {"errors.py", "core/linalg.py", "solvers/base.py"} <= {module.path for module in house()}
    assert [violation for module in house() for violation in rule(module)] == []


# ------------------------------------------------------------------------- the rules can fail, and can be kept

BROKEN: list[tuple[Rule, str, str]] = [
    (lives_in_a_room, "utils.py", ""),
    (lives_in_a_room, "helpers/things.py", ""),
    (imports_go_up_the_list, "core/linalg.py", "from obsprune.solvers import build"),
    (imports_go_up_the_list, "core/linalg.py", "from obsprune import kernels"),
    (imports_go_up_the_list, "core/linalg.py", "import obsprune.engine.layerwise as engine"),
    (imports_go_up_the_list, "core/deep/file.py", "from ...solvers.base import Solver"),
    (imports_go_up_the_list, "models/load.py", "def late():\n    from ..engine import layerwise"),
    (imports_go_up_the_list, "errors.py", "from .core import linalg"),
    (imports_go_up_the_list, "errors.py", "if TYPE_CHECKING:\n    from obsprune.recipe import Recipe"),
    (imports_go_up_the_list, "engine/layerwise.py", "from obsprune.recipe import Recipe"),
    (imports_go_up_the_list, "__init__.py", "from obsprune.errors import ObspruneError"),
    (strangers_stay_strangers, "engine/rounds.py", "from obsprune.evaluate.perplexity import perplexity"),
    (strangers_stay_strangers, "evaluate/mmlu.py", "from obsprune.engine import layerwise"),
    (mathematics_is_plain, "core/linalg.py", "import numpy as np"),
    (mathematics_is_plain, "core/linalg.py", "import triton"),
    (mathematics_is_plain, "core/linalg.py", "import torchvision"),
    (mathematics_is_plain, "solvers/wanda.py", "from obsprune.progress import Progress"),
    (libraries_have_one_owner, "engine/layerwise.py", "from transformers import AutoModel"),
    (libraries_have_one_owner, "cli/main.py", "import transformers"),
    (libraries_have_one_owner, "evaluate/mmlu.py", "import datasets"),
    (libraries_have_one_owner, "engine/layerwise.py", "import torch.distributed as dist"),
    (libraries_have_one_owner, "engine/layerwise.py", "from torch import distributed"),
    (libraries_have_one_owner, "engine/layerwise.py", "import torch\ntorch.distributed.barrier()"),
    (libraries_have_one_owner, "pipeline.py", "from rich.console import Console"),
    (libraries_have_one_owner, "recipe.py", "import typer"),
    (libraries_have_one_owner, "studies/monks.py", "from matplotlib import pyplot"),
    (libraries_have_one_owner, "cli/main.py", "from jinja2 import Environment"),
    (libraries_have_one_owner, "engine/training.py", "import optuna"),
    (layer_kinds_are_asked_in_one_file, "engine/layerwise.py", "isinstance(module, nn.Linear)"),
    (layer_kinds_are_asked_in_one_file, "models/blocks.py", "isinstance(module, (Embedding, Conv1D))"),
    (layer_kinds_are_asked_in_one_file, "models/blocks.py", "issubclass(kind, torch.nn.Conv2d | int)"),
    (layer_kinds_are_asked_in_one_file, "models/blocks.py", "match module:\n    case nn.Conv1d():\n        pass"),
    (layer_kinds_are_asked_in_one_file, "models/blocks.py", "type(module) is nn.Linear"),
    (layer_kinds_are_asked_in_one_file, "models/blocks.py", "KINDS = (nn.Linear,)\nisinstance(module, KINDS)"),
    (nobody_asks_which_pattern, "solvers/sparsegpt.py", "isinstance(pattern, NofM)"),
    (nobody_asks_which_pattern, "models/matrices.py", "isinstance(pattern, patterns.Unstructured)"),
    (nobody_asks_which_pattern, "recipe.py", "match pattern:\n    case PerRow(sparsity):\n        pass"),
    (only_the_cli_prints, "engine/layerwise.py", "print('done')"),
    (only_the_cli_prints, "pipeline.py", "console.print('done')"),
]

KEPT: list[tuple[str, str]] = [
    ("core/linalg.py", "import math\nimport torch.nn.functional\nfrom obsprune.errors import ObspruneError"),
    ("core/deep/file.py", "from ..linalg import damped\nfrom ...errors import InputError"),
    ("kernels/sweep.py", "import triton.language as tl\nfrom obsprune.core.linalg import damped"),
    ("solvers/exact.py", "from obsprune.kernels import sweep\nfrom .base import Solver\nisinstance(x, torch.Tensor)"),
    ("models/matrices.py", "import transformers\nisinstance(module, (nn.Linear, nn.Conv2d))"),
    ("models/blocks.py", "layer = nn.Linear(2, 2)\nisinstance(module, nn.ModuleList)"),
    ("engine/distributed.py", "import torch.distributed as dist\ntorch.distributed.barrier()"),
    ("evaluate/mmlu.py", "from obsprune.models.walk import Walk"),
    ("pipeline.py", "from obsprune import engine, evaluate, __version__\nfrom obsprune.recipe import Recipe"),
    ("cli/main.py", "import typer\nfrom rich import print\nfrom obsprune.pipeline import run\nprint('hello')"),
    ("__main__.py", "from obsprune.cli import main"),
    ("__init__.py", "__version__ = '1'"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_a_broken_rule_is_seen(rule: Rule, path: str, text: str) -> None:
    assert rule(parse(path, text))


@pytest.mark.parametrize(("path", "text"), KEPT)
def test_a_good_module_is_left_in_peace(path: str, text: str) -> None:
    assert [violation for rule in RULES for violation in rule(parse(path, text))] == []
