"""What a long computation tells whoever is watching. The library reports; the CLI decides how it looks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A watcher of one run."""

    def stage(self, title: str, total: int) -> None:
        """A stage of `total` equal steps begins; the one before it is over."""

    def step(self, text: str = "") -> None:
        """One step of the stage is done; `text` says what came out of it."""

    def detail(self, text: str) -> None:
        """What is being worked on right now, inside a step."""

    def notice(self, text: str) -> None:
        """Something the user should know, and that stays on the screen."""

    def line(self, text: str) -> None:
        """An intermediate result that stays on the screen."""


class Silent:
    """The watcher who does not look."""

    def stage(self, title: str, total: int) -> None: ...
    def step(self, text: str = "") -> None: ...
    def detail(self, text: str) -> None: ...
    def notice(self, text: str) -> None: ...
    def line(self, text: str) -> None: ...
