"""Directional pruning where all of it can be computed: quadratic losses with a flat subspace that is known.

The theorem (Chao et al. 2020, Theorem 3.1): for small steps γ, gRDA is near argmin ½ ‖w_SGD(t) − w‖² + λ Σ s̄_j |w_j|,
λ = c √γ t^μ, t = nγ, with SGD from the same start on the same data, and s̄ near the scores s of the flat subspace when t
is large. Beside it what gRDA follows when λ is not small (ours): min λ‖w‖₁ + ½ ‖w − w_0‖² over the bottom Hw = Hw*, of
which w = S_λ(v) with v in w_0 + range(H) is the condition. At λ = 0 that is SGD's end, and its slope there is
−Π₀ sign(w_SGD): directional pruning is its first order in λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log, log10, nan
from typing import final

import torch
from torch import Tensor

from obsprune.core.grda import directional_pruning, directional_scores, threshold
from obsprune.errors import InputError
from obsprune.progress import Progress
from obsprune.report.figures import Curves, Figure, Line
from obsprune.studies.base import Cell, Outcome, Study, Table
from obsprune.studies.directional.valley import Valley, descend, scores_in_time, smallest_zeroed, sparsest_bottom
from obsprune.studies.material import Material

Numbers = dict[str, float]


def apart(a_SD: Tensor, b_SD: Tensor, unit: float) -> float:
    """Root mean square difference of a weight, in units of λ; mean over seeds."""
    return float((a_SD - b_SD).square().mean(-1).sqrt().mean()) / unit


def common_zeros(a: Tensor, b: Tensor) -> float:
    """Zeros of both over zeros of either; 1 where there are none."""
    either = int(((a == 0) | (b == 0)).sum())
    return int(((a == 0) & (b == 0)).sum()) / either if either else 1.0


def zeros(w: Tensor) -> float:
    """Share of exact zeros."""
    return float((w == 0).double().mean())


@final
@dataclass(frozen=True)
class Quadratics(Study):
    """rates: γ of the theorem, at c = `c` and t = `time`, with each of `noises`; times: where s̄ is compared with s;
    strengths: λ at which gRDA, directional pruning and magnitude are compared, at the rate `rate` without noise.
    Values: RATE.noise.N.distance and .scored, gRDA's distance to directional pruning with s and with s̄, in units of λ
    per weight; .moved to SGD, .soft to plain soft thresholding (all s_j = 1); .common, their zeros' overlap; .order,
    the power of γ with which the distance falls. lambda.LAMBDA.zeros, .loss, .directional.loss,
    .magnitude.loss (at gRDA's zeros) and .beside.loss (at those of directional pruning), .path, the distance of gRDA to
    the sparsest bottom, and .linear, that of directional pruning to it.
    """

    seeds: int = 16
    weights: int = 60
    rank: int = 30
    rates: list[float] = field(default_factory=lambda: [0.04, 0.01, 0.0025, 0.000625])
    noises: list[float] = field(default_factory=lambda: [0.0, 0.5])
    c: float = 0.2
    mu: float = 0.6
    time: float = 40.0
    times: list[float] = field(default_factory=lambda: [2.5, 10.0, 40.0, 160.0])
    strengths: list[float] = field(default_factory=lambda: [0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    rate: float = 0.01

    def run(self, material: Material, progress: Progress) -> Outcome:
        if not 0 < self.rank < self.weights:
            raise InputError(f"settings.rank is {self.rank}: from 1 to {self.weights - 1}, fewer than weights")
        valley = Valley.draw(self.seeds, self.rank, self.weights)
        progress.stage("quadratics", len(self.rates) * len(self.noises) + 2)
        theorem: dict[float, dict[float, Numbers]] = {noise: {} for noise in self.noises}
        for noise in self.noises:
            for rate in self.rates:
                theorem[noise][rate] = self._theorem(valley, rate, noise)
                progress.step(f"γ = {rate:g}, noise {noise:g}: distance {theorem[noise][rate]['distance']:.3g} λ")
        scores = {time: self._scores(valley, time) for time in self.times}
        progress.step("scores")
        path = self._path(valley)
        progress.step("path")
        return Outcome(
            _named(theorem, scores, path),
            _tables(theorem, scores, path),
            _figures(theorem, path),
            {"problems": f"{self.seeds} quadratics of {self.weights} weights and rank {self.rank}, one a seed"},
        )

    def _theorem(self, valley: Valley, rate: float, noise: float) -> Numbers:
        steps = round(self.time / rate)
        sgd, grda = descend(valley, [0.0, self.c], rate, self.mu, steps, noise)
        unit = threshold(steps, rate, self.c, self.mu)
        limit = directional_pruning(sgd, directional_scores(sgd, valley.flat), unit)
        scored = directional_pruning(sgd, scores_in_time(valley, sgd, self.time, self.mu), unit)
        soft = directional_pruning(sgd, torch.ones_like(sgd), unit)
        return {
            "lambda": unit,
            "distance": apart(grda, limit, unit),
            "scored": apart(grda, scored, unit),
            "soft": apart(grda, soft, unit),
            "moved": apart(grda, sgd, unit),
            "zeros": zeros(grda),
            "common": common_zeros(grda, limit),
        }

    def _scores(self, valley: Valley, time: float) -> float:
        """The largest |s̄ − s|."""
        w = valley.bottom_SD
        found = scores_in_time(valley, w, time, self.mu) - directional_scores(w, valley.flat)
        return float(found.abs().max())

    def _path(self, valley: Valley) -> dict[float, Numbers]:
        steps = round(self.time / self.rate)
        strengths = [strength / threshold(steps, self.rate, 1.0, self.mu) for strength in self.strengths]
        sgd, *ends = descend(valley, [0.0, *strengths], self.rate, self.mu, steps, 0.0)
        return {unit: _compare(valley, sgd, grda, unit) for unit, grda in zip(self.strengths, ends, strict=True)}


def _compare(valley: Valley, sgd: Tensor, grda: Tensor, unit: float) -> Numbers:
    bottom = sparsest_bottom(valley, unit)
    directional = directional_pruning(sgd, directional_scores(sgd, valley.flat), unit)
    magnitude, beside = (smallest_zeroed(sgd, (one == 0).sum(-1).tolist()) for one in (grda, directional))
    return {
        "zeros": zeros(grda),
        "directional.zeros": zeros(directional),
        "path.zeros": zeros(bottom),
        "loss": float(valley.loss(grda).mean()),
        "directional.loss": float(valley.loss(directional).mean()),
        "magnitude.loss": float(valley.loss(magnitude).mean()),
        "beside.loss": float(valley.loss(beside).mean()),
        "path": apart(grda, bottom, unit),
        "linear": apart(directional, bottom, unit),
        "common": common_zeros(grda, directional),
    }


def order(rates: Sequence[float], distances: Sequence[float]) -> float:
    """The power p of distance ∝ rate^p, between the first and the last."""
    if len(rates) < 2:
        return nan
    return log(distances[0] / distances[-1]) / log(rates[0] / rates[-1])


def _named(
    theorem: Mapping[float, Mapping[float, Numbers]], scores: Mapping[float, float], path: Mapping[float, Numbers]
) -> Numbers:
    values = {f"scores.{time:g}": found for time, found in scores.items()}
    for noise, by_rate in theorem.items():
        values[f"noise.{noise:g}.order"] = order(list(by_rate), [one["distance"] for one in by_rate.values()])
        for rate, one in by_rate.items():
            values |= {f"{rate:g}.noise.{noise:g}.{name}": value for name, value in one.items()}
    for unit, one in path.items():
        values |= {f"lambda.{unit:g}.{name}": value for name, value in one.items()}
    return values


def _tables(
    theorem: Mapping[float, Mapping[float, Numbers]], scores: Mapping[float, float], path: Mapping[float, Numbers]
) -> list[Table]:
    first: list[list[Cell]] = [
        [rate, noise, *one.values()] for noise, by_rate in theorem.items() for rate, one in by_rate.items()
    ]
    third: list[list[Cell]] = [[unit, *one.values()] for unit, one in path.items()]
    distances = ["pruning with s", "with s̄", "soft thresholding", "SGD"]
    losses = [
        f"loss of {name}"
        for name in ("gRDA", "directional pruning", "magnitude at gRDA's zeros", "magnitude at directional pruning's")
    ]
    return [
        Table(
            "Distance of gRDA to directional pruning and others, per weight and in units of λ",
            ["γ", "noise", "λ", *distances, "zeros", "zeros in common"],
            first,
        ),
        Table("Largest |s̄ − s|", ["t", "difference"], [[time, found] for time, found in scores.items()]),
        Table(
            "Larger λ, without noise",
            ["λ", "zeros, gRDA", "directional pruning", "sparsest bottom", *losses,
             "gRDA to sparsest bottom", "directional pruning to it", "zeros in common"],
            third,
        ),
    ]  # fmt: skip


def _figures(theorem: Mapping[float, Mapping[float, Numbers]], path: Mapping[float, Numbers]) -> list[Figure]:
    distances = {
        f"{title}, noise {noise:g}": Line([log10(rate) for rate in by_rate], [one[name] for one in by_rate.values()])
        for noise, by_rate in theorem.items()
        for name, title in (("distance", "directional pruning"), ("soft", "soft thresholding"), ("moved", "SGD"))
    }
    losses = {
        title: Line([one[share] for one in path.values()], [one[loss] for one in path.values()])
        for title, share, loss in (
            ("gRDA", "zeros", "loss"),
            ("directional pruning", "directional.zeros", "directional.loss"),
            ("magnitude", "directional.zeros", "beside.loss"),
        )
    }
    return [
        Figure(
            "quadratics",
            [
                Curves("gRDA's distance to others", "log₁₀ γ", "per weight, in λ", distances, log_y=True),
                Curves("loss of what is pruned", "share of zeros", "loss", losses, log_y=True),
            ],
        )
    ]
