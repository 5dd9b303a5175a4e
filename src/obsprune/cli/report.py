"""`obsprune report`: the page of a run, or of several beside one another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from obsprune.cli import options
from obsprune.cli.carry import OUT
from obsprune.cli.compare_tables import compare_tables
from obsprune.cli.console import quiet_libraries, show
from obsprune.errors import InputError, OutputError, first_line

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Directories of finished runs. Of several the first is the reference."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.html",
        help="Where the page goes. (default: report.html in RUN; of several ./obsprune-out/comparison.html)",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables, only where the page is.")]
PAGES = (".html", ".htm")


@dataclass(frozen=True)
class Found:
    """What is shown of runs: plain values, tables, a page, and where that goes where nobody says otherwise."""

    values: dict[str, Any]
    tables: list[Any]
    page: str
    place: Path


def report(runs: Runs, output: Output = None, json_: options.Json = False, quiet: Quiet = False) -> None:
    """Write a finished run's report.html anew, or a page that compares several: size and score, tests, recipes."""
    quiet_libraries()
    output = output and output.expanduser()
    if output is not None and (output.suffix.lower() not in PAGES or output.is_dir()):
        raise InputError(f"--output {output}: a page is written; name a file that ends in .html")
    found = _looked_at([path.expanduser() for path in runs])
    if output is not None or not json_:
        _write(output or found.place, found.page)
    if json_:
        typer.echo(json.dumps(found.values, indent=1))
        return
    for table in [] if quiet else found.tables:
        show(table)
    typer.echo(output or found.place)


def _looked_at(directories: list[Path]) -> Found:
    try:
        return _one(directories[0]) if len(directories) == 1 else _several(directories)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        told = ", ".join(map(str, directories))
        raise InputError(f"the report of {told} is not as obsprune writes it ({first_line(error)})") from error


def _one(directory: Path) -> Found:
    from obsprune.report.page import make_page
    from obsprune.report.runs import read_runs

    (run,) = read_runs([directory])
    return Found(run.report, [], make_page(run.report), directory / "report.html")


def _several(directories: list[Path]) -> Found:
    from obsprune.report.compare import compare
    from obsprune.report.compare_page import make_page
    from obsprune.report.runs import read_runs

    found = compare(read_runs(directories))
    return Found(found.tree(), compare_tables(found), make_page(found), OUT / "comparison.html")


def _write(place: Path, page: str) -> None:
    """Raises OutputError."""
    from obsprune.models.checkpoint import write_text

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {place.parent}: {error.strerror}; choose another --output") from error
    write_text(place, page)
