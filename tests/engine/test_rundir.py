"""The run directory: it is new, continued, or refused with the reason; a kill never confuses it."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from obsprune.engine.rundir import JOURNAL, RunDir
from obsprune.errors import InputError

BLOCKS = ["layers.0", "layers.1"]


def started(path: Path, force: bool = False, **facts: Any) -> RunDir:
    run = RunDir.open(path, Path("source"), force)
    run.start({"sparsity": 0.5}, {"sparsity": 0.5, "data": {"sha256": "a"}} | facts, BLOCKS, 1000)
    return run


def with_one_block(path: Path) -> RunDir:
    run = started(path)
    run.commit("layers.0", {"w": torch.ones(2)}, [], 1.0)
    return run


def test_a_run_is_continued(tmp_path: Path) -> None:
    first = with_one_block(tmp_path / "out")
    again = started(tmp_path / "out")
    assert again.committed("layers.0") == first.committed("layers.0") is not None
    assert again.committed("layers.1") is None


def test_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    with_one_block(tmp_path / "out")
    with pytest.raises(InputError, match=r"data\.sha256: a -> b.*--force"):
        started(tmp_path / "out", data={"sha256": "b"})
    with pytest.raises(InputError, match=r"sparsity: 0\.5 -> 0\.6"):
        started(tmp_path / "out", sparsity=0.6)


def test_force_starts_anew(tmp_path: Path) -> None:
    with_one_block(tmp_path / "out")
    assert started(tmp_path / "out", force=True, sparsity=0.6).committed("layers.0") is None
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_is_not_ours_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    for force in (False, True):
        with pytest.raises(InputError, match="not made by obsprune"):
            started(tmp_path / "out", force)
    with pytest.raises(InputError, match="is a file"):
        started(tmp_path / "out/thesis.tex")
    with pytest.raises(InputError, match=r"is, or holds, .*out, which is read"):
        RunDir.open(tmp_path / "out", tmp_path / "out")


@pytest.mark.parametrize("name", ["{}", "text={}", "imagenet={}", "{}:ids", "text={}:ids"])
def test_what_is_read_is_never_deleted(tmp_path: Path, name: str) -> None:
    """Neither the source nor data, that lie in the former result, or a link there that leads to them."""
    output = with_one_block(tmp_path / "out").path
    (output / "dense").mkdir()
    (output / "a b.txt").touch()
    (output / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").touch()
    before = sorted(output.iterdir())
    with pytest.raises(InputError, match=r"out is, or holds, .*dense, which is read; choose another -o"):
        RunDir.open(output, output / "dense", True)
    for file in ("a b.txt", "link.txt"):
        with pytest.raises(InputError, match=rf"{file}, which is read"):
            RunDir.open(output, Path("source"), True, names=[None, "c4", name.format(output / file)])
    assert sorted(output.iterdir()) == before
    elsewhere = [name.format(path) for path in (tmp_path / "elsewhere.txt", output / "missing.txt")]
    assert RunDir.open(output, Path("source"), True, names=elsewhere).events == []


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    with_one_block(tmp_path / "out").record("end")
    with pytest.raises(InputError, match="finished run"):
        started(tmp_path / "out")


def test_a_torn_line_is_dropped_and_the_journal_goes_on(tmp_path: Path) -> None:
    with_one_block(tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL
    journal.write_text(journal.read_text() + '{"kind": "block", "name": "lay')
    again = started(tmp_path / "out")
    again.commit("layers.1", {"w": torch.ones(2)}, [], 1.0)
    assert started(tmp_path / "out").committed("layers.1")


def test_a_block_without_its_shard_is_not_done(tmp_path: Path) -> None:
    run = with_one_block(tmp_path / "out")
    shard = run.committed("layers.0")
    assert shard is not None
    shard.unlink()
    assert started(tmp_path / "out").committed("layers.0") is None


def test_the_disk_it_goes_to_is_known_before_it_is_there(tmp_path: Path) -> None:
    assert RunDir.open(tmp_path / "a/b/out", Path("source")).disk == tmp_path
    assert started(tmp_path / "out").disk == tmp_path / "out"


def test_a_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(999))
    with pytest.raises(InputError, match="GB free"):
        started(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_former_run_holds_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = sum(path.stat().st_size for path in with_one_block(tmp_path / "out").path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000 - held))
    assert started(tmp_path / "out", force=True).committed("layers.0") is None


def test_abandon_removes_only_an_empty_run(tmp_path: Path) -> None:
    empty, begun = started(tmp_path / "empty"), with_one_block(tmp_path / "begun")
    empty.abandon()
    begun.abandon()
    assert not (tmp_path / "empty").exists()
    assert begun.committed("layers.0")


def test_a_kill_while_it_is_created_is_no_obstacle(tmp_path: Path) -> None:
    whole = with_one_block(tmp_path / "whole").path
    first_line = (whole / JOURNAL).read_text().splitlines()[0]
    for name, journal in (("empty", None), ("torn", first_line[:20]), ("unsaid", first_line + "\n")):
        (tmp_path / name).mkdir()
        if journal:
            (tmp_path / name / JOURNAL).write_text(journal)
        run = started(tmp_path / name)
        assert sorted(path.name for path in run.path.iterdir()) == [JOURNAL, "recipe.yaml"]
        assert run.recorded("start")


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    """As with a mount point: it cannot be removed, what is inside can."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    started(tmp_path / "link").abandon()
    assert (tmp_path / "link").is_symlink() and not list((tmp_path / "real").iterdir())
    with_one_block(tmp_path / "link")
    again = started(tmp_path / "link", force=True)
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == [JOURNAL, "recipe.yaml"]
    assert again.committed("layers.0") is None


def test_a_kill_while_a_former_run_is_deleted_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_one_block(tmp_path / "out")
    unlink = Path.unlink

    def fragile(path: Path) -> None:
        if path.name == JOURNAL:
            raise KeyboardInterrupt
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fragile)
        with pytest.raises(KeyboardInterrupt):
            started(tmp_path / "out", force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [JOURNAL]
    assert started(tmp_path / "out", force=True).committed("layers.0") is None


def test_a_damaged_journal(tmp_path: Path) -> None:
    journal = with_one_block(tmp_path / "out").path / JOURNAL
    journal.write_text("{\n" + journal.read_text())
    with pytest.raises(InputError, match=r"progress\.jsonl is damaged.*--force"):
        started(tmp_path / "out")
    assert started(tmp_path / "out", force=True).recorded("start")


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot create"):
        started(tmp_path / "file" / "out")
