"""Experiments of the papers: one study a file. STUDIES is the one table from name to class."""

from __future__ import annotations

from importlib import import_module

from obsprune.errors import InputError, nearest
from obsprune.studies.base import Study

STUDIES = {
    "sparse-recovery": "recovery:SparseRecovery",
    "convergence-bound": "bound:ConvergenceBound",
    "obs-monks": "monks:Monks",
    "obs-xor": "xor:Xor",
    "taylor-mnist1d": "taylor:TaylorMnist1d",
    "pruning": "pruning:Pruning",
    "cbs-mobilenet": "mobilenet:MobilenetSurgery",
    "iobs-mobilenet": "mobilenet_rounds:MobilenetRounds",
    "layers": "layers:Layers",
    "elimination": "elimination.networks:Elimination",
    "elimination-bound": "elimination.bound:TaylorError",
    "elimination-cost": "elimination.cost:ScoreCost",
    "elimination-models": "elimination.models:PretrainedElimination",
    "directional-quadratics": "directional.quadratics:Quadratics",
    "directional-pruning": "directional.networks:Directional",
    "directional-images": "directional.images:Images",
    "directional-tuning": "directional.tuning:Tuning",
}
"""Name -> module and class; a module is imported when its study is run."""


def find_study(name: str) -> type[Study]:
    """The class of a study. Raises InputError."""
    if name not in STUDIES:
        raise InputError(f"unknown study '{name}'; {nearest(name, STUDIES)}")
    module, _, kind = STUDIES[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), kind)  # type: ignore[no-any-return]
