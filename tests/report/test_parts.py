"""Parts of a page in Markdown, and numbers as a page says them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from obsprune.report import said
from obsprune.report.markdown import fenced
from obsprune.report.parts import Code, Facts, Marked, Notes, Section, Sentence, Table, Tiles, clean, markdown


def test_parts_in_markdown() -> None:
    parts = [
        Sentence("a | b"),
        Facts([("name", "value"), ("other", Marked("seen"))]),
        Tiles([("what", "5", "more")]),
        Table("Caption", ["x", "y"], [["1", Marked("2")], ["3", ""]]),
        Table("Folded", ["x"], [["hidden"]], folded=True),
        Notes(["one", "<two>"]),
        Code("Line", "echo `x`\n"),
        Code("Long", "hidden", folded=True),
    ]
    assert markdown("T*", "lead", [Section("s", "Title", parts)]) == (
        "# T\\*\n\nlead\n\n## Title\n\na \\| b\n\n"
        "|  |  |\n| --- | --- |\n| name | value |\n| other | **seen** |\n\n"
        "|  |  |  |\n| --- | --- | --- |\n| what | **5** | more |\n\n"
        "Caption:\n\n| x | y |\n| --- | --- |\n| 1 | **2** |\n| 3 |  |\n\n"
        "- one\n- \\<two\\>\n\n"
        "Line:\n\n```text\necho `x`\n```\n"
    )


@pytest.mark.parametrize("line", ["```", "  ````x", "`````"])
def test_no_line_ends_a_block_of_code(line: str) -> None:
    first, *held, last = fenced("text", ["a", line])
    assert held == ["a", line]
    assert first == f"{last}text" and set(last) == {"`"} and len(last) > line.count("`")


def test_short_texts_are_as_clean_as_others() -> None:
    assert clean("50.00 %") == "50.00 %"
    assert clean("\u202e") == "\\u202e" and clean("a\x1b") == "a\\x1b" and clean("a\nb\x00") == "a\nb\\x00"
    assert clean("x hf_abcdefghijkl") == "x hf_***"
    assert clean("a:b@c") == "***@c"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (said.number(0.000123456), "0.0001235"),
        (said.number(123456.0), "1.235e+05"),
        (said.number(math.inf), "not finite"),
        (said.number(None), "not finite"),
        (said.score(2.5), "2.5000"),
        (said.score(math.nan), "not finite"),
        (said.percent(0.12345), "12.35 %"),
        (said.seconds(0.00065), "0.65 ms"),
        (said.seconds(1.5), "1.5 s"),
        (said.seconds(119.9), "120 s"),
        (said.seconds(150.4), "2 min 30 s"),
        (said.seconds(7320.0), "2 h 2 min"),
        (said.size(2_500_000), "2.50 MB"),
        (said.size(7.1e10), "71.00 GB"),
        (said.plain(True), "yes"),
        (said.plain([224, 224]), "224, 224"),
        (said.plain(12345), "12,345"),
        (said.plain("a"), "a"),
        (said.counted(1, "matrix", "matrices"), "1 matrix"),
        (said.counted(2000, "matrix", "matrices"), "2,000 matrices"),
        (said.task("imagenet=/home/x/labels.tsv"), "imagenet=labels.tsv"),
    ],
)
def test_as_a_person_says_it(found: str, expected: str) -> None:
    assert found == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"sequences": 16, "seqlen": 2048}, "16 × 2,048 tokens"),
        ({"images": 50000}, "50,000 images"),
        ({"questions": 14042}, "14,042 questions"),
        ({}, ""),
    ],
)
def test_what_was_measured_on(values: dict[str, Any], expected: str) -> None:
    assert said.measured_on(values) == expected
