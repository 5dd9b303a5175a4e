"""`obsprune bench-inference`: dense against sparse on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from obsprune.cli import options
from obsprune.cli.console import Watch, quiet_libraries
from obsprune.cli.tables import add_row, new_table, plain

BatchSizes = Annotated[
    list[int] | None,
    typer.Option("--batch-size", min=1, help="Sequences or images at once. Repeatable. (default: 1 and 16)"),
]
Dense = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The dense model, as baseline. (default: DIR as it is)")
]
Prompt = Annotated[
    int | None, typer.Option(min=1, help="Tokens of prefill. (default: 128, or what the model has room for)")
]
New = Annotated[int, typer.Option("--new", min=0, help="Tokens decoded after it, one by one; 0: prefill alone.")]
Repeats = Annotated[
    int, typer.Option(min=2, help="Measurements of each form, by turns; of fewer than 6 nothing can be said.")
]
CsrFrom = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="On CPUs, Linear layers with this share of zeros are tried as CSR.")
]


def bench_inference(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A sparse checkpoint: a directory or an id.")],
    dense: Dense = None,
    batch_size: BatchSizes = None,
    prompt: Prompt = None,
    new: New = 32,
    repeats: Repeats = 10,
    csr_from: CsrFrom = 0.8,
    dtype: options.Dtype = None,
    device: options.Device = None,
    revision: options.Revision = None,
    token: options.Token = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure whether a sparse checkpoint is faster here than the dense one, in the forms that leave zeros out."""
    quiet_libraries()
    from obsprune.evaluate import inference

    asked = inference.Asked(tuple(batch_size or (1, 16)), prompt, new, repeats, csr_from=csr_from)
    with Watch(quiet or json_) as watch:
        found = inference.bench_inference(
            directory, watch, dense, asked, device=device or "auto", dtype=dtype or "auto", revision=revision,
            token=token, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    typer.echo(json.dumps(found, indent=1) if json_ else bench_tables(found))


def bench_tables(found: dict[str, Any]) -> str:
    """The forms and their weights, the times and what may be said of them, and why."""
    forms = new_table("weights", ["form", "MB", "Linear layers in it"])
    for form, one in found["forms"].items():
        add_row(
            forms, form, f"{one['bytes'] / 1e6:,.1f}", f"{one['layers']} of {found['linears']}" if one["layers"] else ""
        )
    times = new_table("latency", ["batch", "phase", "form", "median ms", "quartiles", "ratio", "verdict"], left=3)
    for row in found["rows"]:
        taken = row["seconds"]
        between = f"{_ms(taken['low'])} – {_ms(taken['high'])}"
        add_row(
            times, row["batch"], row["phase"], row["form"], _ms(taken["median"]), between, f"{row['ratio']:.2f}",
            row["verdict"],
        )  # fmt: skip
    absent = new_table("not here", ["form", "why"], left=2)
    for form, why in found["absent"].items():
        add_row(absent, form, why)
    return f"{plain(forms, times, *([absent] if found['absent'] else []))}\n\n{_setting(found)}\n{found['conclusion']}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _setting(found: dict[str, Any]) -> str:
    on = found["machine"]
    busy = f"; it was busy: {on['load']:g} processes wanted its {on['cores']} cores" if on["load"] > on["cores"] else ""
    return (
        f"{found['work']}, in {found['dtype']}; {found['repeats']} times each, by turns, after {found['warmup']} that "
        f"are not counted; {on['device']}, threads: {on['threads']}, torch {on['torch']}{busy}. "
        f"Ratio: time {found['baseline']} / time in this form."
    )
