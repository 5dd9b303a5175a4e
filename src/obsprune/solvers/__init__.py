"""One method a file. SOLVERS is the one table from name to class; `build` makes a solver from its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from obsprune.errors import InputError, nearest
from obsprune.solvers.admm import ADMM
from obsprune.solvers.base import AnySolver
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
