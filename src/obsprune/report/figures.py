"""Figures as plain values, and the one place that draws them (matplotlib, without a screen)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from obsprune.errors import InputError
from obsprune.models.checkpoint import write_atomic

PANEL = (4.6, 3.4)
"""Inches of one panel, wide and high."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's, which the colour-blind can tell apart."""
STYLES = ("-", "--", "-.", ":")
RIGHT: Mapping[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
"""A legend at the right of its panel."""


@dataclass(frozen=True)
class Line:
    """One curve; low and high are the edges of its band; star: the place of a point to mark."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    star: int | None = None


class Panel(ABC):
    """One picture of a figure."""

    @abstractmethod
    def draw(self, axes: Any) -> None:
        """Draws itself into matplotlib's axes."""


@final
@dataclass(frozen=True)
class Curves(Panel):
    """Lines by name, each in a colour and a style of its own. legend: where matplotlib puts it, None for nowhere:
    panels with the same lines share one.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    log_x: bool = False
    log_y: bool = False
    legend: Mapping[str, Any] | None = field(default_factory=dict)

    def draw(self, axes: Any) -> None:
        for index, (name, line) in enumerate(self.lines.items()):
            turn = index // len(COLOURS)  # so that no two lines have both in common
            colour, style = COLOURS[index % len(COLOURS)], STYLES[(index + turn) % len(STYLES)]
            axes.plot(line.x, line.y, style, color=colour, label=name, linewidth=1.5)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
            if line.star is not None:
                axes.plot(line.x[line.star], line.y[line.star], "*", color=colour, markersize=11)
        axes.set(title=self.title, xlabel=self.x, ylabel=self.y)
        axes.set_xscale("symlog" if self.log_x else "linear")
        axes.set_yscale("log" if self.log_y else "linear")
        axes.grid(alpha=0.3)
        if self.legend is not None:
            axes.legend(**self.legend, fontsize="small", frameon=False)


@final
@dataclass(frozen=True)
class Dots(Panel):
    """Points by name: x and y of each."""

    title: str
    x: str
    y: str
    clouds: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_y: bool = False

    def draw(self, axes: Any) -> None:
        for index, (name, (x, y)) in enumerate(self.clouds.items()):
            axes.plot(
                x, y, "ox^sDv"[index % 6], color=COLOURS[index % len(COLOURS)], label=name, markersize=4, alpha=0.6
            )
        axes.set(title=self.title, xlabel=self.x, ylabel=self.y)
        axes.set_yscale("log" if self.log_y else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", framealpha=0.8)  # dots may be anywhere, also under it


@final
@dataclass(frozen=True)
class Pictures(Panel):
    """Rows of grey images [h, w], dark where they are high; a row by name."""

    title: str
    rows: Mapping[str, Sequence[Tensor]]

    def draw(self, axes: Any) -> None:
        import torch

        strips = [torch.cat([image.float() for image in images], 1) for images in self.rows.values()]
        axes.imshow(torch.cat(strips).numpy(), cmap="gray_r", interpolation="nearest")
        height = strips[0].shape[0]
        axes.set(title=self.title, xticks=[], yticks=[height * (row + 0.5) for row in range(len(strips))])
        axes.set_yticklabels(list(self.rows))


@dataclass(frozen=True)
class Figure:
    """Panels side by side; `name` is its file's."""

    name: str
    panels: Sequence[Panel]


def require_matplotlib() -> None:
    """Raises InputError when figures cannot be drawn: to be asked before an hour is spent."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError("figures are drawn by matplotlib; pip install 'obsprune[recipes]'") from error


def save(figure: Figure, directory: Path) -> Path:
    """Draws a figure into NAME.png; the same figure gives the same bytes. Raises InputError without matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet

    sheet = Sheet(figsize=(PANEL[0] * len(figure.panels), PANEL[1]), dpi=110, layout="constrained")
    FigureCanvasAgg(sheet)
    for index, panel in enumerate(figure.panels, 1):
        panel.draw(sheet.add_subplot(1, len(figure.panels), index))
    path = directory / f"{figure.name}.png"
    write_atomic(path, lambda temporary: sheet.savefig(temporary, format="png", metadata={"Software": None}))
    return path
