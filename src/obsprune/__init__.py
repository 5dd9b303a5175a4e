"""Make pretrained Hugging Face checkpoints sparse.

Importing it lets transformers' from_pretrained read packed checkpoints, and loads nothing until transformers is used.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "prune": "obsprune.api",
    "make_recipe": "obsprune.api",
    "Result": "obsprune.api",
    "Recipe": "obsprune.recipe",
    "Solver": "obsprune.solvers.base",
    "State": "obsprune.solvers.base",
    "Solution": "obsprune.solvers.base",
    "Gram": "obsprune.core.statistics",
    "Pattern": "obsprune.core.patterns",
    "Unstructured": "obsprune.core.patterns",
    "PerRow": "obsprune.core.patterns",
    "NofM": "obsprune.core.patterns",
    "InputError": "obsprune.errors",
    "SparsityCallback": "obsprune.models.trainer",
    "keep_sparse": "obsprune.models.sparse_training",
    "merge_lora": "obsprune.core.lora",
    "to_semi_structured": "obsprune.models.semi_structured",
}
"""What `obsprune.NAME` is, and the module it is imported from when somebody asks for it."""

__all__ = [*PUBLIC]

JOINT, READER = "transformers.modeling_utils", "obsprune.models.packed_loading"


class _AfterTransformers(MetaPathFinder):
    """Imports READER as soon as transformers has imported JOINT, of which all that loads models is made."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == JOINT else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                import_module(READER)

            spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'obsprune' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]


if JOINT in sys.modules:
    import_module(READER)
else:
    sys.meta_path.insert(0, _AfterTransformers())
