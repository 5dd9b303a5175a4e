"""`obsprune inspect`: of a result, what became of every matrix; of any other checkpoint, what would be pruned. Reports
and files' headers alone are read, unless zeros are to be counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obsprune.cli import options
from obsprune.cli.console import Watch, quiet_libraries
from obsprune.cli.inspect_tables import inspect_table, survey_table

if TYPE_CHECKING:
    from obsprune.models.load import Model

Zeros = Annotated[bool, typer.Option("--zeros", help="Read the weights and count their zeros, of any checkpoint.")]


def inspect(
    model: Annotated[str, typer.Argument(help="A result of obsprune, a checkpoint, a Hugging Face id, or 'demo'.")],
    zeros: Zeros = False,
    skip: options.Skip = None,
    revision: options.Revision = None,
    token: options.Token = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_: options.Json = False,
) -> None:
    """Show what became of every matrix of a result, or what would be pruned of a checkpoint; no weight is read unless
    --zeros is given.
    """
    quiet_libraries()
    from obsprune.engine.rundir import JOURNAL, REPORT
    from obsprune.models.caution import is_file
    from obsprune.models.load import outline
    from obsprune.models.survey import survey

    directory = Path(model).expanduser()
    reported = _reported(directory) if any(is_file(directory / name) for name in (REPORT, JOURNAL)) else None
    if reported and not zeros:
        show(reported, inspect_table, json_)
        return
    empty = outline(model, revision=revision, token=token, device="cpu", skip=skip, trust_remote_code=trust_remote_code)
    if zeros:
        show(_counted(empty, reported, json_), inspect_table, json_)
    else:
        show(survey(empty), survey_table, json_)


def _reported(directory: Path) -> dict[str, Any]:
    """What the report of a result says, which can be shown. Raises InputError."""
    from obsprune.engine.rundir import REPORT
    from obsprune.errors import InputError, first_line
    from obsprune.pipeline import inspect_result

    try:
        reported = inspect_result(directory)
        inspect_table(reported)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{directory / REPORT} is not as obsprune writes it ({first_line(error)})") from error
    return reported


def _counted(empty: Model, reported: dict[str, Any] | None, quiet: bool) -> dict[str, Any]:
    """The zeros that are stored now, beside the errors that a report knows of the same matrices."""
    from obsprune.models.survey import count_zeros

    with Watch(quiet) as watch:
        matrices = count_zeros(empty, watch)
    known = reported["matrices"] if reported else []
    errors = {matrix["name"]: {"error": matrix["error"]} for matrix in known if "error" in matrix}
    if errors.keys() >= {matrix["name"] for matrix in matrices}:
        matrices = [matrix | errors[matrix["name"]] for matrix in matrices]
    zeros, weights = (sum(of) for of in zip(*((m["zeros"], math.prod(m["shape"])) for m in matrices), strict=True))
    total = {"reached": zeros / weights, "zeros": zeros, "weights": weights}
    return {"output": str(empty.directory), "sparsity": total, "matrices": matrices, "coverage": []}


def show(found: dict[str, Any], table: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """On stdout, for a person or for a machine."""
    typer.echo(json.dumps(found, indent=1) if as_json else table(found))
