"""`obsprune recipe`: presets to read and to copy; the papers' experiments, to run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from obsprune.cli import options
from obsprune.cli.console import Watch, err, guarded, quiet_libraries
from obsprune.cli.tables import add_row, new_table, plain, verdict_table

app = typer.Typer(help="Presets and the papers' experiments: list, show, run.", no_args_is_help=True)
OUT = Path("obsprune-out") / "recipes"
Data = Annotated[
    Path | None,
    typer.Option(
        envvar="OBSPRUNE_ASSETS",
        exists=True,
        file_okay=False,
        help="A folder with the data: mnist/, mnist1d/, monks/.",
        show_default=False,
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Another value of one of its `settings` (recipe show): steps=5. Repeatable."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Show what would be pruned, and on how much. A recipe that names a shape needs neither data nor weights, "
        "another its model in --data.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Where the results go. (default: ./obsprune-out/recipes/PAPER/NAME)"),
]


@app.command("list")
def list_() -> None:
    """Name every preset and every experiment, with what it is."""
    from obsprune import presets
    from obsprune.studies import recipes

    known = {
        "presets, for prune --preset": {name: presets.path_of(name) for name in presets.names()},
        "experiments, for recipe run": {name: recipes.root() / f"{name}.yaml" for name in recipes.names()},
    }
    for title, paths in known.items():
        typer.echo(f"{title}:")
        for name, path in paths.items():
            typer.echo(f"  {name:26} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A preset or an experiment.")]) -> None:
    """Print the YAML of a preset (what --config takes) or of an experiment."""
    from obsprune import presets
    from obsprune.studies import recipes

    with guarded():
        own = name in presets.names()
        paths = [presets.path_of(name)] if own else recipes.paths_of(name, presets.names(), large=True).values()
        typer.echo("\n".join(path.read_text(encoding="utf-8") for path in paths), nl=False)


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="A paper, one of its experiments (PAPER/NAME), or a YAML file.")],
    smoke: Annotated[bool, typer.Option("--smoke", help="Everything once, as small as it goes.")] = False,
    dry_run: DryRun = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="How often it is repeated. (default: the recipe's)")] = None,
    data: Data = None,
    set_: Setting = None,
    output_dir: Output = None,
    force: options.Force = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run an experiment and hold its numbers against those expected; exit code 1 when one differs."""
    quiet_libraries()
    from obsprune import presets
    from obsprune.engine.distributed import alone
    from obsprune.errors import InputError
    from obsprune.studies import recipes
    from obsprune.studies.material import Material
    from obsprune.trees import merge, parse_setting

    found: dict[str, Any] = {}
    with guarded():
        alone("recipe run")
        if name in presets.names():
            raise InputError(f"{name} is a preset; obsprune prune MODEL --preset {name}")
        settings = (parse_setting(text.removeprefix("settings.")) for text in set_ or [])
        changes = merge(*settings, {"seeds": seeds} if seeds else {})
        if dry_run:
            _show(*recipes.planned(recipes.paths_of(name, large=True), Material(data), smoke, changes), json_)
            return
        planned = {
            known: recipes.Experiment.prepare(
                path, _folder(known, output_dir, smoke), Material(data), smoke, changes, force
            )
            for known, path in recipes.paths_of(name).items()
        }  # all of them, before the first one's work
        for known, experiment in planned.items():
            with Watch(quiet or json_) as watch:
                found[known] = experiment.run(watch)
            if not json_:
                typer.echo(plain(verdict_table(known, found[known])))
                err.print(f"tables and figures: {experiment.output}")
    if json_:
        typer.echo(json.dumps(found, indent=1))
    if not all(verdict["met"] for results in found.values() for verdict in results["verdicts"]):
        raise typer.Exit(1)


def _folder(name: str, asked: Path | None, smoke: bool) -> Path:
    return asked / Path(name).name if asked else OUT / f"{name}-smoke" if smoke else OUT / name


def _show(plans: dict[str, Any], reasons: dict[str, str], as_json: bool) -> None:
    """What experiments come to, by the names of their recipes, and why some cannot be planned, for a person or for a
    machine.
    """
    if as_json:
        told = {name: {"values": plan.values, "tables": list(map(asdict, plan.tables))} for name, plan in plans.items()}
        typer.echo(json.dumps(told | {name: {"not_planned": reason} for name, reason in reasons.items()}, indent=1))
        return
    for name, plan in plans.items():
        typer.echo(f"{name}\n\n{plain(*map(_table, plan.tables))}\n")
    for name, reason in reasons.items():
        typer.echo(f"{name} is not planned: {reason}")


def _table(told: Any) -> Table:
    """A study's table for the terminal."""
    table = new_table(told.title, list(told.columns), left=2)
    for row in told.rows:
        add_row(table, *row)
    return table
