"""What a long experiment keeps: one answer for each question, about the data as it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from obsprune.studies.kept import Kept, stamp, stamp_named


def test_an_answer_is_found_once_and_what_a_stopped_attempt_left_is_there(tmp_path: Path) -> None:
    left: list[bool] = []

    def work(place: Path) -> dict[str, int]:
        left.append(place.is_dir())
        place.mkdir(exist_ok=True)
        if len(left) == 1:
            raise KeyboardInterrupt
        return {"tries": len(left)}

    kept = Kept(tmp_path, {"data": "as it is"})
    with pytest.raises(KeyboardInterrupt):
        kept.once("a", {"size": 1}, work)
    assert [kept.once("a", {"size": 1}, work)["tries"] for _ in range(2)] == [2, 2]
    assert left == [False, True]
    assert kept.once("a", {"size": 2}, work)["tries"] == 3
    assert Kept(tmp_path, {"data": "as it was"}).once("a", {"size": 1}, work)["tries"] == 4
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text("longer"),
        lambda file: os.utime(file, (1, 1)),
        lambda file: file.rename(file.with_name("b.txt")),
        lambda file: (file.parent / "c.txt").touch(),
    ],
)
def test_a_stamp_is_of_names_sizes_and_times(tmp_path: Path, change: Callable[[Path], object]) -> None:
    file = tmp_path / "data" / "deep" / "a.txt"
    file.parent.mkdir(parents=True)
    file.write_text("one")
    before = stamp(tmp_path / "data")
    assert stamp(tmp_path / "data") == before
    change(file)
    assert stamp(tmp_path / "data") != before


def test_what_a_name_stands_for(tmp_path: Path) -> None:
    file = tmp_path / "x=1.tsv"
    file.touch()
    assert stamp_named(str(file)) == stamp_named(f"imagenet={file}") == stamp(file)
    assert stamp_named("wikitext2") == stamp_named("mmlu") == stamp_named(f"text={tmp_path}/none") == ""
