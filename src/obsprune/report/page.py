"""One HTML file from sections, without scripts and without anything from elsewhere, and the same in Markdown.

Everything is escaped by the templates' engine, and what would change how a text is read (controls, changes of
direction) is spelt out: names come from models and data sets. Nothing depends on time or place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from obsprune import __version__
from obsprune.report.card import title
from obsprune.report.parts import Section, clean, markdown
from obsprune.report.pathless import pathless_command, without_known
from obsprune.report.sections import lead, make_sections

TEMPLATES = Path(__file__).parent / "templates"


def make_page(report: Mapping[str, Any]) -> str:
    """The text of report.html."""
    return render(title(report), lead(report), make_sections(report))


def make_text(report: Mapping[str, Any]) -> str:
    """The text of report.md, without a place on this machine: it is for repositories."""
    told = without_known({**report, "command": pathless_command(report["command"])})
    return markdown(title(told), lead(told), make_sections(told))


PAGES: dict[str, Callable[[Mapping[str, Any]], str]] = {"report.html": make_page, "report.md": make_text}
"""What is written beside report.json."""


def render(title: str, lead: str, sections: Sequence[Section], template: str = "page.html.j2") -> str:
    """A page as HTML. lead: what it is about, in a sentence or two; sections that have no parts are left out."""
    filled = [section for section in sections if section.parts]
    values = {"title": title, "lead": lead, "sections": filled, "version": __version__}
    return environment().get_template(template).render(values)


@cache
def environment() -> Environment:
    """The engine: it escapes everywhere and does not know a name that nobody gave it."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """What is written for a value: text without what would steer a page, and never markup."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
