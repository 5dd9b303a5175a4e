"""A page in a real browser: headless Chromium of the system, driven by playwright; what it says, asks for and shows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""As which systems know it."""
PATIENCE = 10
"""Seconds in which a page must have been painted."""
LOOK = (Path(__file__).parent / "browser.js").read_text()


def installed() -> str:
    """Where Chromium is; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is installed ({', '.join(NAMES)})")
    return found


@dataclass
class Visit:
    """A page that is open. said: messages of its console, errors of its scripts, dialogs; asked: every address that it
    wanted beside its own.
    """

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def look(self, what: str) -> Any:
        """Calls one of the functions of browser.js."""
        return self.page.evaluate(f"look.{what}()")

    def times(self) -> dict[str, float]:
        """Milliseconds from the beginning of the navigation until it was loaded, and until something was painted."""
        until = time.monotonic() + PATIENCE  # playwright's own waiting is a script, which the page forbids
        while self.page.evaluate("performance.getEntriesByType('paint').length") < 2 and time.monotonic() < until:
            self.page.wait_for_timeout(20)
        told = "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('paint')]"
        entries = self.page.evaluate(f"{told}.map((one) => one.toJSON())")
        ends = {one["name"]: one.get("loadEventEnd") or one["startTime"] for one in entries}
        return {"loaded": next(iter(ends.values())), "painted": ends["first-contentful-paint"]}


@contextmanager
def launched() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    path = installed()
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # root has none
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visited(
    browser: Any, file: Path, width: int = 1280, scheme: str = "light", scripts: bool = True
) -> Iterator[Visit]:
    """A file in a window of that width, without a network."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts, offline=True
    )
    try:
        visit = Visit(context.new_page())
        own = file.as_uri()

        def asked(route: Any) -> None:
            if route.request.url == own:
                route.continue_()
            else:
                visit.asked.append(route.request.url)
                route.abort()

        context.route("**/*", asked)
        visit.page.on("console", lambda message: visit.said.append(message.text))
        visit.page.on("pageerror", lambda error: visit.said.append(str(error)))
        visit.page.on("dialog", lambda dialog: (visit.said.append(dialog.message), dialog.dismiss()))
        visit.page.goto(own, wait_until="load")
        if scripts:
            visit.page.evaluate(LOOK)
        yield visit
    finally:
        context.close()


def tabbed(visit: Visit) -> list[tuple[str, bool]]:
    """What Tab goes through, in its order, and whether it is seen there."""
    found: list[tuple[str, bool]] = []
    for _ in range(len(visit.look("stops")) + 2):
        visit.page.keyboard.press("Tab")
        where = visit.look("focused")
        if where is None or (found and where[0] == found[0][0]):
            break
        found.append((where[0], where[1]))
    return found
