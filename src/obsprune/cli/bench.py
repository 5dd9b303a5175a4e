"""`obsprune bench`: every phase of a run on random weights of a named shape, beside what this machine could do."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obsprune.cli import options
from obsprune.cli.carry import given
from obsprune.cli.console import Watch, guarded, quiet_libraries
from obsprune.cli.tables import add_row, new_table, plain
from obsprune.cli.tables import seconds as spoken
from obsprune.errors import InputError

if TYPE_CHECKING:
    from obsprune.bench.runs import Asked

LEAST = 5e-4
"""A phase with a smaller share of the time is not shown."""

Shape = Annotated[
    str | None,
    typer.Option(help="Of the weights, such as llama-2-7b. (default: llama-2-7b on a GPU, deit-tiny on a CPU)"),
]
Method = Annotated[
    list[str] | None,
    typer.Option(
        help="sparsegpt, fast, balanced, iobs (--solver sparsegpt --iters 3), best. Repeatable. (default: all but "
        "fast, where there is room)"
    ),
]
Blocks = Annotated[
    int | None, typer.Option(min=1, help="Only so many blocks; times are scaled to all of them. (default: all)")
]
Growth = Annotated[
    bool, typer.Option("--growth", help="How time and memory grow: 4 widths, 4 numbers of tokens, the first method.")
]
Workdir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the weights lie meanwhile. (default: where temporary files go)"),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSON, after each method or point anew.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show what disk, memory and flops it would take, beside what is free, and stop."),
]


@guarded("the same command begins anew; what was measured is in the file of -o, where one was named")
def bench(
    shape: Shape = None,
    method: Method = None,
    blocks: Blocks = None,
    growth: Growth = False,
    nsamples: options.Nsamples = None,
    seqlen: options.Seqlen = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    set_: options.Set = None,
    workdir: Workdir = None,
    output: Output = None,
    dry_run: DryRun = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time every phase of pruning random weights of a named shape, beside what this machine could do at best."""
    quiet_libraries()
    from obsprune.bench.runs import Asked
    from obsprune.trees import parse_setting

    _check(growth and dry_run, output)
    flags = given(data=given(nsamples=nsamples, seqlen=seqlen), model=given(dtype=dtype))
    settings = [flags, *map(parse_setting, set_ or [])]
    asked = Asked(shape, tuple(method or ()), device or "auto", blocks, settings, workdir)
    found, told = _dry(asked, quiet or json_) if dry_run else _measured(asked, growth, output, quiet or json_)
    if output is not None:
        _keep(output, found)
    typer.echo(json.dumps(found, indent=1) if json_ else told)


def _check(both: bool, output: Path | None) -> None:
    """Before anything is measured. Raises InputError."""
    if both:
        raise InputError("--growth has no --dry-run: its models are small, and made one by one")
    if output is not None:
        _check_file(output)


def _check_file(output: Path) -> None:
    """Raises InputError where it cannot be written."""
    folder = output.resolve().parent
    if not folder.is_dir():
        raise InputError(f"there is no directory {folder} for {output.name}; make it, or choose another -o")
    if output.exists() and not output.is_file():
        raise InputError(f"{output} is no file; choose another -o")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write in {folder}: {error.strerror}; choose another -o") from error


def _dry(asked: Asked, silent: bool) -> tuple[dict[str, Any], str]:
    from obsprune.bench.runs import outlook

    with Watch(silent) as watch:
        found = outlook(asked, watch)
    return found, outlook_tables(found)


def _measured(asked: Asked, growth: bool, output: Path | None, silent: bool) -> tuple[dict[str, Any], str]:
    from obsprune.bench.growth import growth as measure_growth
    from obsprune.bench.runs import bench as measure

    def tell(found: dict[str, Any]) -> None:
        if output is not None:
            _keep(output, found)

    with Watch(silent) as watch:
        if growth:
            found = measure_growth(asked, watch, tell)
            return found, growth_tables(found)
        found = measure(asked, watch, tell)
    return found, bench_tables(found)


def _keep(output: Path, found: dict[str, Any]) -> None:
    from obsprune.models.checkpoint import write_text

    write_text(output, json.dumps(found, indent=1))


# ------------------------------------------------------------------------------------------------ tables


def phase_table(found: dict[str, Any], one: dict[str, Any]) -> Any:
    """One method, its longest phases first."""
    columns = ["phase", "s", "share", "Tflop", "GB", "limit s", "reached"]
    table = new_table(f"{one['method']}: {_what(found)}", columns)
    for phase in sorted(one["phases"], key=lambda phase: -phase["seconds"]):
        if phase["seconds"] < LEAST * one["seconds"]:
            break
        flops, moved = sum(phase["flops"].values()) / 1e12, max(phase["bytes"].values(), default=0) / 1e9
        add_row(
            table, phase["phase"], f"{phase['seconds']:.3g}", f"{phase['seconds'] / one['seconds']:.1%}",
            f"{flops:.3g}" if flops else "", f"{moved:.3g}" if moved else "", f"{phase['limit']:.2g}",
            f"{phase['share']:.1%}" if phase["limit"] else "",
        )  # fmt: skip
    return table


def bench_tables(found: dict[str, Any]) -> str:
    """The ceilings, every method's phases, and the methods beside one another."""
    ceilings = new_table("ceilings of this machine", ["", "measured"])
    for name, rate in found["ceilings"].items():
        add_row(ceilings, name, f"{rate / 1e9:,.1f} {'GB/s' if ' ' in name or name == 'memory' else 'Gflop/s'}")
    scaled = found["blocks"] != found["of"]
    columns = ["method", "time", *([f"scaled to {found['of']} blocks"] if scaled else []), "host GB", "device GB"]
    table = new_table("all", columns)
    for one in found["methods"]:
        memory, times = one["memory"], [one["seconds"], *([one["scaled_seconds"]] if scaled else [])]
        device = memory.get("device_bytes")
        add_row(
            table, one["method"], *map(spoken, times), f"{memory['host_bytes'] / 1e9:.2f}",
            "" if device is None else f"{device / 1e9:.2f}",
        )  # fmt: skip
    phases = [phase_table(found, one) for one in found["methods"]]
    return f"{plain(ceilings, *phases, table, *_left_out(found))}\n\n{_setting(found)}"


def _what(found: dict[str, Any]) -> str:
    """The shape, and how much of it."""
    part = f", {found['blocks']} of {found['of']} blocks" if found["blocks"] != found["of"] else ""
    return f"{found['shape']}{part}"


def _setting(found: dict[str, Any]) -> str:
    on, length = found["machine"], f" x {found['seqlen']}" if found["seqlen"] else ""
    busy = f"; it was busy: {on['load']:g} processes wanted its {on['cores']} cores" if on["load"] > on["cores"] else ""
    return (
        f"{found['samples']}{length} samples; limit: flops and bytes at the ceilings; reached: limit / time. "
        f"{on['device']}, threads: {on['threads']}, torch {on['torch']}{busy}."
    )


def outlook_tables(found: dict[str, Any]) -> str:
    """What would be needed, beside what there is."""
    needs = new_table(_what(found), ["", "needed GB", "free GB"])
    free = found["free"]
    for method, one in found["memory"].items():
        add_row(
            needs, f"disk, {method}", *(f"{x / 1e9:.2f}" for x in (found["disk_bytes"][method], free["disk_bytes"]))
        )
        for kind in ("host", "device"):
            if f"{kind}_bytes" in one:
                row = one[f"{kind}_bytes"], free[f"{kind}_bytes"]
                add_row(needs, f"{kind} memory, {method}", *(f"{size / 1e9:.2f}" for size in row))
    flops = new_table("one pass over all samples", ["", "Tflop"])
    for part, count in found["flops"].items():
        add_row(flops, part, f"{count / 1e12:.3g}")
    return plain(needs, flops, *_left_out(found))


def _left_out(found: dict[str, Any]) -> list[Any]:
    """Methods that there is no room for."""
    table = new_table("left out", ["method", "why"], left=2)
    for method, why in found["left_out"].items():
        add_row(table, method, why)
    return [table] if found["left_out"] else []


def growth_tables(found: dict[str, Any]) -> str:
    """Every point beside the smallest, and the laws."""
    points, first = found["points"], found["points"][0]
    columns = ["width", "tokens", "s", "x", "forward, Gram s", "solve s", "MB"]
    table = new_table(f"growth, {found['method']}", columns, left=0)
    for one in points:
        parts = (f"{one[name]:.3g}" for name in ("by_tokens", "by_width"))
        times = f"{one['seconds']:.3g}", f"{one['seconds'] / first['seconds']:.1f}"
        add_row(table, one["width"], f"{one['tokens']:,}", *times, *parts, f"{one['bytes'] / 1e6:.0f}")
    laws = new_table("laws", ["", "of the largest point", "farthest from a point"], left=3)
    for quantity in ("seconds", "bytes"):
        law = found["laws"][quantity]
        shares = ", ".join(f"{term}: {share:.0%}" for term, share in law["shares"].items())
        add_row(laws, quantity, shares, f"{law['farthest']:.0%}")
    powers = found["laws"]["powers"]
    by_tokens, by_width = powers["by_tokens"], powers["by_width"]
    last = f"Alone: forward and Gram ~ N^{by_tokens['N']:.2f} d^{by_tokens['d']:.2f}, solve ~ d^{by_width['d']:.2f}."
    return f"{plain(table, laws)}\n\n{last}"
