"""One method a file. SOLVERS is the one table from name to class; `build` makes a solver from its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from obsprune.errors import InputError, nearest
from obsprune.solvers.admm import ADMM
from obsprune.solvers.base import AnySolver, Solver
from obsprune.solvers.compensated import Compensated
from obsprune.solvers.magnitude import Magnitude
from obsprune.solvers.obc import OBC
from obsprune.solvers.refitted import ExactlyRefitted, Refitted
from obsprune.solvers.sparsegpt import SparseGPT
from obsprune.solvers.wanda import Wanda

SOLVERS: dict[str, type[AnySolver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "obc": OBC,
    "admm": ADMM,
}

WRAPPERS: dict[str, Any] = {"refit": 0, "exact": False, "compensate": False}


def options(name: str) -> dict[str, Any]:
    """The options of a solver with their defaults, and those that every solver has: `refit` (PCG steps after it; 0 =
    none), `exact` (an exact refit instead), `compensate` (biases, where there are any, take the lost mean).

    Raises InputError for an unknown name.
    """
    if name not in SOLVERS:
        raise InputError(f"unknown solver '{name}'; {nearest(name, SOLVERS)}")
    return {field.name: field.default for field in fields(cast(Any, SOLVERS[name]))} | WRAPPERS


def build(name: str, given: Mapping[str, Any]) -> AnySolver:
    """The solver `name` with the options `given` (see `options`), wrapped as they say."""
    chosen = options(name) | dict(given)
    steps, exact, compensate = (chosen.pop(key) for key in WRAPPERS)
    solver = SOLVERS[name](**chosen)
    if exact:
        solver = ExactlyRefitted(solver)
    elif steps:
        solver = Refitted(solver, steps)
    return Compensated(solver) if compensate else solver


def described(solver: AnySolver) -> dict[str, Any]:
    """Where a solver's class is defined and what its fields are, as plain values: `options` of one that is in no table.

    Raises InputError when it is no dataclass, or a field is neither a plain value nor a solver.
    """
    if not isinstance(solver, Solver):
        raise InputError(f"{solver!r} is no solver; an object of a class made of obsprune.Solver is expected")
    kind = type(solver)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not is_dataclass(solver):
        raise InputError(f"solver {name} is no dataclass; its options must be the fields of one, to be in the report")
    return {"name": name, **WRAPPERS, **{field.name: _plain(name, field.name, solver) for field in fields(solver)}}


def _plain(name: str, field: str, solver: AnySolver) -> Any:
    value = getattr(solver, field)
    if isinstance(value, Solver):
        return described(value)
    if value is not None and not isinstance(value, str | int | float):
        raise InputError(f"{field} of solver {name} is {value!r}; a number, a word, a bool or a solver is expected")
    return value
