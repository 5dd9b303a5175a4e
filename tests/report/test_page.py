"""report.html and report.md: whole in one file, true, the same each time, and never of somebody else's making."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from kinds import KINDS
from markdown_it import MarkdownIt
from synthetic import synthetic_report

from obsprune.report.heatmap import luminance
from obsprune.report.page import PAGES, TEMPLATES, make_page, make_text

Report = dict[str, Any]
HOSTILE = (
    "\"'><script>alert(1)</script><img src=x onerror=alert(1)> --> ]]> </style></title></svg> {{ 7*7 }} {% raw %} "
    "javascript:alert(1) [x](javascript:alert(1)) `b` | c \u202e\u2066 \x00\x1b[31m \ud800 &lt; &amp; $x$ "
    "http://evil.example\n# h"
)
KNOWN = {"metric", "unit", "schema", "revision", "pattern", "step", "tune"}
"""Keys whose values are names of ours."""
NAMED = {"evaluation", "told", "skipped", "tried"}
"""Keys under which keys are names of others."""


class Page(HTMLParser):
    """What a browser would find. tags: [(name, {attribute: value})]; text: all that is read."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.read: list[tuple[tuple[str, ...], str]] = []
        self.open = list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.read.append((tuple(self.open), data))

    def text_in(self, tag: str) -> str:
        return "".join(data for where, data in self.read if tag in where)

    @cached_property
    def text(self) -> str:
        return "".join(data for where, data in self.read if "style" not in where)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        """Tags and the names of their attributes, in order: what markup of somebody else's would change."""
        return [(tag, tuple(attributes)) for tag, attributes in self.tags]


def replaced(tree: Any, text: str, key: str = "") -> Any:
    """A report in which every name that comes from elsewhere ends with a text."""
    if isinstance(tree, dict):
        new = (lambda name: f"{name}{text}") if key in NAMED else (lambda name: name)
        return {new(name): replaced(value, text, name) for name, value in tree.items()}
    if isinstance(tree, list):
        return [replaced(value, text, key) for value in tree]
    return f"{tree}{text}" if isinstance(tree, str) and key not in KNOWN else tree


@pytest.fixture(scope="module")
def report() -> Report:
    return synthetic_report()


def test_the_file_is_whole(report: Report) -> None:
    """No script, nothing from elsewhere, and a policy that says so."""
    html = make_page(report)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    attributes = {name for _, found in page.tags for name in found}
    assert not [name for name in attributes if name.startswith("on")] and "src" not in attributes
    assert all(found["href"].startswith("#") for found in page.of("a"))
    assert not re.search(r"url\(|@import|https?:", html)
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'") and "script" not in policy


@pytest.mark.parametrize("kind", ["synthetic", *KINDS])
def test_names_are_never_markup(made: Callable[[str], Path], kind: str) -> None:
    own = synthetic_report(2) if kind == "synthetic" else json.loads((made(kind) / "report.json").read_text())
    page, quiet = Page(make_page(replaced(own, HOSTILE))), Page(make_page(replaced(own, "x" * len(HOSTILE))))
    assert page.shape == quiet.shape
    assert page.text.count("<script>alert(1)</script>") > 20, "it is read as it is written"
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", page.text) and "\\u202e" in page.text
    assert "{{ 7*7 }}" in page.text and "49 {% raw" not in page.text


def test_templates_escape_everything() -> None:
    for path in TEMPLATES.iterdir():
        text = path.read_text()
        assert not re.search(r"\|\s*safe|autoescape|Markup|=\{\{", text), path


@pytest.mark.parametrize("kind", ["synthetic", *KINDS])
def test_text_is_no_markup_either(made: Callable[[str], Path], kind: str) -> None:
    own = synthetic_report(2) if kind == "synthetic" else json.loads((made(kind) / "report.json").read_text())
    hostile, quiet = (list(tokens(make_text(replaced(own, text)))) for text in (HOSTILE, "xx"))
    assert [kind for kind, _ in hostile] == [kind for kind, _ in quiet]
    assert not {"html_block", "html_inline", "link_open", "image", "code_inline"} & {kind for kind, _ in hostile}


def tokens(text: str) -> Iterator[tuple[str, str]]:
    """What Markdown makes of a text."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token.type, token.content
        yield from ((child.type, child.content) for child in token.children or () if child.type != "text")


def test_places_on_this_machine_are_not_in_the_text(report: Report) -> None:
    here = copy.deepcopy(report)
    here["recipe"]["model"]["name"] = here["model"]["source"] = "/home/some body/secret place/model"
    here["warnings"] = ["/home/some body/secret place/model/config.json is odd"]
    here["command"] = "obsprune prune '/home/some body/secret place/model' -o /tmp/out"
    here["model"]["base"] = None
    text = make_text(here)
    assert "secret" not in text and "/tmp" not in text and "obsprune prune model -o out" in text
    assert "secret place" in make_page(here), "whoever made it needs it"


def test_the_same_report_gives_the_same_bytes(report: Report) -> None:
    again = json.loads(json.dumps(report))
    assert make_page(report) == make_page(again) and make_text(report) == make_text(again)


def test_a_model_of_seven_billion(report: Report) -> None:
    """224 matrices, far below 2 MB; and a mixture with ten thousand, whose experts are one place each."""
    begin = time.perf_counter()
    html = make_page(report)
    assert time.perf_counter() - begin < 5
    assert len(html.encode()) < 500_000 and len(report["matrices"]) == 224
    page = Page(html)
    assert sum("cell" in rect.get("class", "") for rect in page.of("rect")) == 2 * (224 + 7), "and the legends"
    listed = page.text_in("table")
    assert all(matrix["name"] in listed for matrix in report["matrices"])
    many = copy.deepcopy(report)
    many["matrices"] = [
        matrix | {"name": matrix["name"].replace("mlp.", f"mlp.experts.{expert}.")}
        for matrix in report["matrices"]
        for expert in range(48)
    ]
    large = make_page(many)
    assert len(many["matrices"]) == 10_752 and len(large.encode()) < 2_000_000
    assert "The 1,000 with the largest errors of 10,752" in large


def test_everything_is_named_and_reached(report: Report) -> None:
    """Of those who do not see it, or have no mouse."""
    page = Page(make_page(report))
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    labels = [name for _, found in page.tags for name in found.get("aria-labelledby", "").split()]
    assert set(labels) <= set(ids) and labels
    assert {found["href"][1:] for found in page.of("a")} <= set(ids)
    drawings = page.of("svg")
    assert len(drawings) == 6 and all(one["role"] == "img" and one["aria-labelledby"] for one in drawings)
    assert len(page.of("desc")) == 6 and len(page.of("figcaption")) >= 6
    assert len(page.of("table")) == len(page.of("caption"))
    assert all(found.get("scope") in ("col", "row") for found in page.of("th"))
    boxes = [found for found in page.of("div") if found.get("class") == "scroll"]
    assert len(boxes) == len(page.of("table")) + 6
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in boxes)
    assert all(found.get("tabindex") == "0" for found in page.of("pre"))
    assert page.of("html") == [{"lang": "en"}] and page.text.count("Made-up-7b, 50 % sparse") == 2


@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read(dark: bool) -> None:
    """WCAG AA: 4.5 : 1 for text, 3 : 1 for what is drawn."""
    style = (TEMPLATES / "style.css").read_text()
    light, night = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6});", light)) | (
        dict(re.findall(r"--(\w+): (#\w{6});", night)) if dark else {}
    )
    grounds = [colours[name] for name in ("paper", "box")]
    for name in ("ink", "soft", "link"):
        assert all(contrast(colours[name], ground) >= 4.5 for ground in grounds), name
    assert all(contrast(colours["ink"], colours[name]) >= 4.5 for name in ("best", "differs", "wrong"))
    for name in ("star", *(f"s{number}" for number in range(6))):
        assert all(contrast(colours[name], ground) >= 3 for ground in grounds), name


def contrast(first: str, second: str) -> float:
    low, high = sorted(luminance(colour) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def test_the_names_of_the_pages() -> None:
    assert list(PAGES) == ["report.html", "report.md"]
