"""The one table from name to solver, and how options reach it."""

from __future__ import annotations

import pytest

from obsprune.errors import InputError
from obsprune.solvers import SOLVERS, build, options
from obsprune.solvers.refitted import Refitted
from obsprune.solvers.sparsegpt import SparseGPT


def test_options_are_the_fields_with_their_defaults_and_refit() -> None:
    wrappers = {"refit": 0, "exact": False, "compensate": False}
    assert options("sparsegpt") == {"damping": 0.01, "blocksize": 128, **wrappers}
    assert options("magnitude") == wrappers


@pytest.mark.parametrize("name", SOLVERS)
def test_defaults_build_the_plain_solver(name: str) -> None:
    assert build(name, {}) == build(name, options(name)) == SOLVERS[name]()


def test_refit_wraps_the_solver_with_its_own_options() -> None:
    assert build("sparsegpt", {"damping": 0.1, "refit": 7}) == Refitted(SparseGPT(damping=0.1), 7)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    for ask in (options, lambda name: build(name, {})):
        with pytest.raises(InputError, match=r"unknown solver 'sparsgpt'; did you mean sparsegpt\?.*magnitude"):
            ask("sparsgpt")
