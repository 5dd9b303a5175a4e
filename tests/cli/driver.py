"""The type of the `cli` fixture."""

from collections.abc import Callable

from typer.testing import Result

Cli = Callable[..., Result]
