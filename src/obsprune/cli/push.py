"""`obsprune push`: a finished result to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obsprune.cli import options
from obsprune.cli.console import Watch, quiet_libraries, tell
from obsprune.errors import InputError

if TYPE_CHECKING:
    from obsprune.models.upload import Repository

Result = Annotated[Path, typer.Argument(help="A finished result of obsprune, dense or packed.")]
To = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository, made where it is not there.")]
Branch = Annotated[str | None, typer.Option("--revision", help="The branch to upload to. (default: main)")]


def push(
    source: Result,
    repo: To,
    private: options.Private = False,
    revision: Branch = None,
    token: options.Token = None,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Upload a finished result with its card, recipe and report to the Hugging Face hub."""
    quiet_libraries()
    from obsprune.models.upload import Repository
    from obsprune.report.sharing import share

    with Watch(quiet or json_) as watch:
        found = share(source.expanduser(), Repository(repo, private, token, revision), watch)
    tell(found, [], json_)
    if not json_:
        typer.echo(found["url"])


def repository(name: str | None, private: bool, token: str | None) -> Repository | None:
    """Where `--push-to-hub` says that a result goes. Raises InputError."""
    if name is None and private:
        raise InputError("--private is about a repository: add --push-to-hub OWNER/NAME, or drop it")
    if name is None:
        return None
    from obsprune.models.upload import Repository

    return Repository(name, private, token)
