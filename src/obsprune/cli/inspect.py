"""`obsprune inspect`: of a result, what became of every matrix; of any other checkpoint, what would be pruned. Reports
and files' headers alone are read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from obsprune.cli import options
from obsprune.cli.console import quiet_libraries
from obsprune.cli.tables import add_row, inspect_table, new_table, plain, times


def inspect(
    model: Annotated[str, typer.Argument(help="A result of obsprune, a checkpoint, a Hugging Face id, or 'demo'.")],
    skip: options.Skip = None,
    revision: options.Revision = None,
    token: options.Token = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_: options.Json = False,
) -> None:
    """Show what became of every matrix of a result, or what would be pruned of a checkpoint; no weight is read."""
    quiet_libraries()
    from obsprune.engine.rundir import JOURNAL, REPORT
    from obsprune.errors import InputError, first_line
    from obsprune.models.caution import is_file
    from obsprune.models.load import outline
    from obsprune.models.survey import survey
    from obsprune.pipeline import inspect_result

    directory = Path(model).expanduser()
    if any(is_file(directory / name) for name in (REPORT, JOURNAL)):
        try:
            show(inspect_result(directory), inspect_table, json_)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{directory / REPORT} is not as obsprune writes it ({first_line(error)})") from error
        return
    empty = outline(model, revision=revision, token=token, device="cpu", skip=skip, trust_remote_code=trust_remote_code)
    show(survey(empty), survey_table, json_)


def show(found: dict[str, Any], table: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """On stdout, for a person or for a machine."""
    typer.echo(json.dumps(found, indent=1) if as_json else table(found))


def survey_table(found: dict[str, Any]) -> str:
    """What would be pruned, what stays dense and why, and the sums."""
    matrices = new_table("would be pruned", ["matrix", "shape", "stored as"])
    for (name, shape, dtype), count in Counter((m["alike"], _shape(m), m["dtype"]) for m in found["matrices"]).items():
        add_row(matrices, times(name, count), shape, dtype)
    dense = new_table("stays dense", ["weight", "why", "shape", "stored as"], left=2)
    for weight in found["skipped"]:
        add_row(dense, weight["name"], weight["why"], _shape(weight), weight["dtype"] or "another weight")
    facts = new_table("checkpoint", ["", ""], left=2)
    dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in found["dtypes"].items())
    add_row(facts, "model", f"{found['architecture']} ({found['type']}), {found['kind']}")
    add_row(facts, "stored", f"{dtypes}; {found['bytes'] / 1e6:,.1f} MB in {', '.join(found['files'])}")
    share = f"{found['prunable'] / found['parameters']:.1%} of the numbers stored"
    where = f"{len(found['matrices'])} matrices of {len(found['blocks'])} blocks"
    add_row(facts, "to prune", f"{found['prunable']:,} weights in {where}, {share}")
    for key in found["unknown"]:
        add_row(facts, "kept as it is", f"{key}: the model has no place for it")
    return plain(matrices, dense, facts)


def _shape(entry: dict[str, Any]) -> str:
    return " x ".join(map(str, entry["shape"]))
