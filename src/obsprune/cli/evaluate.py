"""`obsprune eval`: scores of a checkpoint, alone or beside another."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from obsprune.cli import options
from obsprune.cli.carry import OUT
from obsprune.cli.console import Watch, err, quiet_libraries
from obsprune.cli.tables import eval_table
from obsprune.errors import InputError


def evaluate(
    model: options.Model = None,
    task: options.Task = None,
    compare: options.Compare = None,
    limit: options.Limit = None,
    num_fewshot: options.NumFewshot = None,
    seqlen: options.Seqlen = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    revision: options.Revision = None,
    token: options.Token = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure perplexity or accuracy, with its whole protocol (without MODEL: of the newest result in obsprune-out)."""
    quiet_libraries()
    if model is None:
        model = str(newest_result())
        err.print(f"evaluating the newest result in {OUT}: {model}")
    from obsprune.engine.distributed import processes
    from obsprune.eval_pipeline import evaluate_checkpoint

    with processes() as ranks, Watch(quiet or json_ or not ranks.first) as watch:
        scores = evaluate_checkpoint(
            model, task or [], watch, compare, limit, seqlen=seqlen, num_fewshot=num_fewshot, dtype=dtype or "auto",
            device=device or "auto", revision=revision, token=token, trust_remote_code=trust_remote_code, ranks=ranks,
        )  # fmt: skip
    if ranks.first:
        typer.echo(json.dumps(scores, indent=1) if json_ else eval_table(scores))


def newest_result() -> Path:
    """The result in ./obsprune-out that was finished last. Raises InputError when there is none."""
    reports = sorted(OUT.glob("*/report.json"), key=lambda path: path.stat().st_mtime)
    if not reports:
        raise InputError("there is no result in ./obsprune-out; name a model, or prune one first: obsprune prune demo")
    return reports[-1].parent
