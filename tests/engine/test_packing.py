"""Whole checkpoints packed and unpacked; nothing unfinished can be loaded, and nothing of others is deleted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from zoo import ZOO as FAMILIES
from zoo import Zoo, random_model

from obsprune.engine import packing
from obsprune.engine.packing import MARKER, drop_dense, pack, pack_beside, unpack
from obsprune.errors import InputError, OutputError
from obsprune.models.checkpoint import MADE, PACKED_INDEX
from obsprune.models.load import open_checkpoint
from obsprune.progress import Silent


class Heard(Silent):
    """Remembers what stays on the screen."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


def files(directory: Path) -> dict[str, bytes]:
    """All but what says who made them."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name != MADE}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in several files, with others beside them."""
    path = tmp_path / "sharded"
    random_model(FAMILIES["llama"]).to(torch.bfloat16).save_pretrained(path, max_shard_size="20kB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    (path / "README.md").write_text("# a model\n")
    (path / "report.json").write_text("{}")
    return path


def test_a_directory_comes_back_byte_by_byte(sharded: Path, tmp_path: Path) -> None:
    told = pack(sharded, tmp_path / "small", Silent())
    again = unpack(tmp_path / "small", tmp_path / "again", Silent())
    assert files(tmp_path / "again") == files(sharded)
    assert not list((tmp_path / "small").glob("model*")) and (tmp_path / "small" / "README.md").is_file()
    dense = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    assert told["dense_bytes"] == again["dense_bytes"] == dense
    assert told["packed_bytes"] == again["packed_bytes"] == dense * told["share"] < dense
    assert told["tensors"] == again["tensors"] == sum(len(load_file(path)) for path in sharded.glob("*.safetensors"))


def test_packing_is_reproducible(sharded: Path, tmp_path: Path) -> None:
    pack(sharded, tmp_path / "one", Silent())
    pack(sharded, tmp_path / "two", Silent())
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_directory_can_be_packed_where_it_is(sharded: Path, tmp_path: Path) -> None:
    pack(sharded, tmp_path / "small", Silent())
    pack_beside(sharded, Silent())
    drop_dense(sharded)
    assert files(sharded) == files(tmp_path / "small")


@pytest.fixture
def moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A checkpoint of two files, and copies of its directory after every step of packing it where it is."""
    found = [tmp_path / "dense"]
    random_model(FAMILIES["llama"]).save_pretrained(found[0], max_shard_size="120kB")
    shutil.copytree(found[0], tmp_path / "packed")

    def watched(work: Callable[..., object]) -> Callable[..., object]:
        def then_copied(*arguments: object, **named: object) -> object:
            done = work(*arguments, **named)
            found.append(tmp_path / f"moment-{len(found)}")
            shutil.copytree(tmp_path / "packed", found[-1], copy_function=os.link)
            return done

        return then_copied

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, watched(getattr(Path, name)))
        pack_beside(tmp_path / "packed", Silent())
        drop_dense(tmp_path / "packed")
    assert len(found) == 1 + 4 + 3  # two files, index and config; then index and two files
    return found


def test_at_every_moment_it_is_loaded_rightly(moments: list[Path]) -> None:
    expected = AutoModelForCausalLM.from_pretrained(moments[0]).state_dict()
    for directory in moments:
        found, checkpoint = AutoModelForCausalLM.from_pretrained(directory).state_dict(), open_checkpoint(directory)
        read = checkpoint.read(checkpoint.headers)
        assert all(torch.equal(found[name], expected[name]) for name in expected), directory
        assert all(torch.equal(read[name], expected[name]) for name in expected), directory


@pytest.mark.slow
def test_strangers_load_it_rightly_or_not_at_all(moments: list[Path]) -> None:
    """Those who do not import obsprune."""
    assert strangers(moments) == ["right"] * 5 + ["refused"] * 3


def strangers(directories: list[Path]) -> list[str]:
    """What becomes of these checkpoints in another process, beside the first one."""
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
expected = AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict()
for directory in sys.argv[1:]:
    try:
        found = AutoModelForCausalLM.from_pretrained(directory).state_dict()
        print("right" if all(torch.equal(found[name], expected[name]) for name in expected) else "wrong")
    except OSError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program, *map(str, directories)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_what_is_left_out_is_told(sharded: Path, tmp_path: Path) -> None:
    (sharded / "onnx").mkdir()
    (sharded / "model.safetensors").write_bytes(b"of another format, and not in the index")
    (sharded / ".cache").mkdir()
    heard = Heard()
    pack(sharded, tmp_path / "small", heard)
    assert sorted(heard.notices) == [
        "model.safetensors is left out: it is no part of the checkpoint",
        "onnx/ is left out: directories are not copied",
    ]
    assert not (tmp_path / "small" / "model.safetensors").exists()


@pytest.mark.parametrize("step", ["pack_file", "_copy_others", "write_packed_index", "packed_config"])
def test_an_error_leaves_nothing(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object) -> None:
        raise OutputError("the disk is full")

    source, output = zoo("llama"), tmp_path / "small"
    if step == "packed_config":  # its first call is a check
        monkeypatch.setattr(packing, "_complete", fail)
    else:
        monkeypatch.setattr(packing, step, fail)
    with pytest.raises(OutputError):
        pack(source, output, Silent())
    assert not output.exists()


def test_a_kill_leaves_what_cannot_be_loaded_and_can_be_begun_again(zoo: Zoo, tmp_path: Path) -> None:
    output = tmp_path / "small"
    pack(zoo("llama"), output, Silent())
    whole = files(output)
    (output / "config.json").unlink()
    (output / MARKER).touch()
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(output)
    pack(zoo("llama"), output, Silent())
    assert files(output) == whole


def test_former_results_are_kept_unless_forced(zoo: Zoo, tmp_path: Path) -> None:
    output = tmp_path / "small"
    pack(zoo("llama"), output, Silent())
    (output / "more").mkdir()
    with pytest.raises(InputError, match="holds a former result; use --force"):
        pack(zoo("gpt2"), output, Silent())
    pack(zoo("gpt2"), output, Silent(), force=True)
    unpack(output, tmp_path / "again", Silent())
    assert files(tmp_path / "again") == files(zoo("gpt2"))
    pack(zoo("llama"), output, Silent(), force=True)
    unpack(output, tmp_path / "again", Silent(), force=True)
    assert files(tmp_path / "again") == files(zoo("llama"))


def test_a_former_result_outlives_an_error(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "small"
    pack(zoo("llama"), output, Silent())
    before = files(output)

    def fail(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(packing, "_copy_others", fail)
    with pytest.raises(OutputError):
        pack(zoo("gpt2"), output, Silent(), force=True)
    assert files(output) == before
    monkeypatch.undo()
    pack(zoo("gpt2"), output, Silent(), force=True)
    assert files(output) != before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_kill_before_the_former_result_is_deleted_is_no_obstacle(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, former = tmp_path / "small", tmp_path / ".small.former"
    pack(zoo("llama"), output, Silent())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        pack(zoo("gpt2"), output, Silent(), force=True)
    assert former.is_dir()
    with pytest.raises(InputError, match="former, which is read"):
        unpack(former, output, Silent(), force=True)
    pack(zoo("llama"), output, Silent(), force=True)
    unpack(output, tmp_path / "again", Silent())
    assert files(tmp_path / "again") == files(zoo("llama")) and not former.exists()


def test_an_output_that_is_a_link_is_replaced_twice(zoo: Zoo, tmp_path: Path) -> None:
    pack(zoo("llama"), tmp_path / "real", Silent())
    (tmp_path / "small").symlink_to(tmp_path / "real")
    for family in ("gpt2", "llama"):
        pack(zoo(family), tmp_path / "small", Silent(), force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "small"]


def test_other_peoples_files_are_never_deleted(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="was not made by obsprune"):
        pack(zoo("llama"), tmp_path / "mine", Silent(), force=True)
    with pytest.raises(InputError, match="is a file"):
        pack(zoo("llama"), tmp_path / "mine" / "letter.txt", Silent(), force=True)
    assert files(tmp_path / "mine") == {"letter.txt": b"dear"}


def test_the_source_is_never_the_output(sharded: Path) -> None:
    for output in (sharded, sharded.parent):
        with pytest.raises(InputError, match=r"is, or holds, .*, which is read"):
            pack(sharded, output, Silent(), force=True)


def test_nothing_that_is_read_is_deleted(zoo: Zoo, tmp_path: Path) -> None:
    """Masks, say, that lie in the very result that is to be replaced."""
    output = tmp_path / "small"
    pack(zoo("llama"), output, Silent())
    (output / "masks.safetensors").write_bytes(b"masks")
    before = files(output)
    with (
        pytest.raises(InputError, match=r"masks\.safetensors, which is read"),
        packing.begun([zoo("gpt2"), output / "masks.safetensors"], output, True),
    ):
        pass
    assert files(output) == before


def test_what_cannot_be_packed_is_refused(zoo: Zoo, tmp_path: Path, sharded: Path) -> None:
    small, empty = tmp_path / "small", tmp_path / "empty"
    empty.mkdir()
    pack(zoo("llama"), small, Silent())
    for source, said in ((tmp_path / "none", "no directory"), (empty, "no model.safetensors"), (small, "already")):
        with pytest.raises(InputError, match=said):
            pack(source, tmp_path / "out", Silent())
    (sharded / "config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        pack(sharded, tmp_path / "out", Silent())
    with pytest.raises(InputError, match=f"is not packed: it has no {PACKED_INDEX}"):
        unpack(zoo("llama"), tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_damage_is_named_and_leaves_nothing(zoo: Zoo, tmp_path: Path) -> None:
    pack(zoo("llama"), tmp_path / "small", Silent())
    (path,) = (tmp_path / "small").glob("*.safetensors")
    whole = bytearray(path.read_bytes())
    whole[-9] ^= 16
    path.write_bytes(whole)
    with pytest.raises(InputError, match=f"{path.name} is damaged at tensor .*; pack it again, or download it again"):
        unpack(tmp_path / "small", tmp_path / "again", Silent())
    assert not (tmp_path / "again").exists()
