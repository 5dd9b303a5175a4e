"""Values, tables and figures of the study of directional pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from obsprune.report.figures import Curves, Dots, Figure, Line
from obsprune.studies.base import Cell, Outcome, Table, spread
from obsprune.studies.directional.bench import Found

Ways = Mapping[str, Sequence[float]]
"""line.loss, line.error, curve.loss and curve.error from t = 0 to 1: training loss, and test error in percent."""

WAYS = {"line": "straight line", "curve": "trained curve"}


@dataclass(frozen=True)
class Compared:
    """gRDA's network, and SGD's with as many zeros."""

    grda: Found
    magnitude: Found
    retrained: Found


@dataclass(frozen=True)
class Story:
    """All that was found, a list over seeds each. runs: by name; joined: the one that the ways of
    "grda" lead to; those of "other" lead to SGD's network from another start; places: the t of each
    value of a way.
    """

    sgd: Sequence[Found]
    runs: Mapping[str, Sequence[Compared]]
    ways: Sequence[Mapping[str, Ways]]
    joined: str
    places: Sequence[float]

    def outcome(self, facts: Mapping[str, str]) -> Outcome:
        values = self._values() | self._peaks()
        return Outcome(values, [self._runs(), self._layers(), self._ways()], [self._accuracy(), self._curve()], facts)

    def _values(self) -> dict[str, float]:
        sgd = mean(one.test for one in self.sgd)
        values = {f"sgd.{what}": mean(getattr(one, what) for one in self.sgd) for what in ("test", "train", "loss")}
        for name, several in self.runs.items():
            for what in ("zeros", "test", "train", "loss"):
                values[f"{name}.{what}"] = mean(getattr(one.grda, what) for one in several)
            values[f"{name}.magnitude"] = mean(one.magnitude.test for one in several)
            values[f"{name}.retrained"] = mean(one.retrained.test for one in several)
            values[f"{name}.drop"] = sgd - values[f"{name}.test"]
        return values

    def _peaks(self) -> dict[str, float]:
        """The worst place between the ends, and the worse end."""
        found: dict[str, float] = {}
        for pair in self.ways[0]:
            several = [one[pair] for one in self.ways]
            found |= {f"{pair}.{way}": mean(max(one[way][1:-1]) for one in several) for way in several[0]}
            for what in ("loss", "error"):
                found[f"{pair}.ends.{what}"] = mean(_ends(one, what) for one in several)
        return found

    def _runs(self) -> Table:
        title = f"{len(self.sgd)} seeds, mean ± std; accuracies in %"
        columns = ["run", "zeros, %", "training loss", "training", "test", "magnitude, as many zeros", "and retrained"]
        rows: list[list[Cell]] = [["SGD", "0", *_cells(self.sgd), "", ""]]
        for name, several in self.runs.items():
            zeros = spread([100 * one.grda.zeros for one in several])
            others = (spread([one.magnitude.test for one in several]), spread([one.retrained.test for one in several]))
            rows.append([name, zeros, *_cells([one.grda for one in several]), *others])
        return Table(title, columns, rows)

    def _layers(self) -> Table:
        """Shares of zeros, layer by layer; magnitude's at as many zeros in all beside gRDA's."""
        count = len(self.sgd[0].layers)
        columns = ["network", *(f"layer {layer + 1}, %" for layer in range(count))]
        rows: list[list[Cell]] = []
        for name, several in self.runs.items():
            for title, networks in (
                (name, [one.grda for one in several]),
                ("magnitude", [one.magnitude for one in several]),
            ):
                shares = [spread([100 * network.layers[layer] for network in networks]) for layer in range(count)]
                rows.append([title, *shares])
        return Table("Zeros by layer", columns, rows)

    def _ways(self) -> Table:
        columns = ["from SGD to", "way", "highest training loss", "highest test error, %"]
        rows: list[list[Cell]] = []
        for pair, title in self._pairs.items():
            several = [one[pair] for one in self.ways]
            for way, told in WAYS.items():
                peaks = (spread([max(one[f"{way}.{what}"][1:-1]) for one in several]) for what in ("loss", "error"))
                rows.append([title, told, *peaks])
            rows.append(
                [title, "the worse end", *(spread([_ends(one, what) for one in several]) for what in ("loss", "error"))]
            )
        return Table("Between two networks", columns, rows)

    @property
    def _pairs(self) -> dict[str, str]:
        """What a way leads to, by its name."""
        return {"grda": self.joined, "other": "SGD from another start"}

    def _accuracy(self) -> Figure:
        runs = [one for several in self.runs.values() for one in several]
        shares = [one.grda.zeros for one in runs]
        clouds = {
            "SGD": ([0.0 for _ in self.sgd], [one.test for one in self.sgd]),
            "gRDA": (shares, [one.grda.test for one in runs]),
            "magnitude": (shares, [one.magnitude.test for one in runs]),
            "magnitude, retrained": (shares, [one.retrained.test for one in runs]),
        }
        layers = {
            name: Line(
                range(1, len(self.sgd[0].layers) + 1),
                [mean(s) for s in zip(*(one.grda.layers for one in several), strict=True)],
            )
            for name, several in self.runs.items()
        }
        return Figure(
            "accuracy",
            [
                Dots("every network", "share of zeros", "test accuracy, %", clouds),
                Curves("zeros by layer, gRDA", "layer", "share of zeros", layers),
            ],
        )

    def _curve(self) -> Figure:
        panels = []
        for what, axis in (("loss", "training loss"), ("error", "test error, %")):
            lines = {
                f"{told} to {title}": Line(self.places, _mean([one[pair][f"{way}.{what}"] for one in self.ways]))
                for pair, title in self._pairs.items()
                for way, told in WAYS.items()
            }
            panels.append(Curves("from SGD (t = 0) to another network", "t", axis, lines))
        return Figure("curve", panels)


def _ends(ways: Ways, what: str) -> float:
    """The higher of both."""
    return max(ways[f"line.{what}"][0], ways[f"line.{what}"][-1])


def _cells(networks: Sequence[Found]) -> list[Cell]:
    return [spread([getattr(one, what) for one in networks]) for what in ("loss", "train", "test")]


def _mean(several: Sequence[Sequence[float]]) -> list[float]:
    return [mean(column) for column in zip(*several, strict=True)]
