"""`obsprune pack` and `obsprune unpack`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from driver import Cli
from zoo import Zoo

from obsprune.models.checkpoint import MADE, PACKED_INDEX
from obsprune.models.load import locate


def files(directory: Path) -> dict[str, bytes]:
    """All but what says who made them."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != MADE}


def test_a_result_goes_there_and_back(cli: Cli, pruned_demo: Path, tmp_path: Path) -> None:
    there = cli("pack", pruned_demo, "-o", "small")
    assert there.exit_code == 0 and there.stdout == "small\n", there.stderr
    assert "MB dense" in there.stderr and (tmp_path / "small" / PACKED_INDEX).is_file()
    back = cli("unpack", "small", "-o", "again", "--json")
    told = json.loads(back.stdout)
    assert back.exit_code == 0 and told["output"] == "again" and told["share"] < 0.75 and not back.stderr
    assert files(tmp_path / "again") == files(pruned_demo)
    quiet = cli("unpack", "small", "-o", "again", "--force", "--quiet")
    assert quiet.exit_code == 0 and quiet.stdout == "again\n" and not quiet.stderr


def test_errors_are_one_sentence(cli: Cli, pruned_demo: Path) -> None:
    assert cli("pack", pruned_demo, "-o", "small", "--quiet").exit_code == 0
    for words, said in (
        (("pack", pruned_demo, "-o", "small"), "use --force"),
        (("pack", "small", "-o", "smaller"), "packed already"),
        (("unpack", pruned_demo, "-o", "again"), "is not packed"),
        (("unpack", "./nowhere", "-o", "again"), "there is no directory ./nowhere"),
        (("pack", "nowhere", "-o", "again"), "'nowhere' is no local directory"),
    ):
        shown = cli(*words)
        assert shown.exit_code == 2 and said in shown.stderr
        assert shown.stderr.startswith("error: ") and len(shown.stderr.splitlines()) == 1


def test_what_prune_takes_can_be_packed(cli: Cli, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("pack", "demo", "-o", "small", "--quiet").exit_code == 0
    assert cli("unpack", "small", "-o", "again", "--quiet").exit_code == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (locate("demo") / "model.safetensors").read_bytes()
    there = {("org/model", "v1", "secret"): zoo("llama")}
    monkeypatch.setattr("obsprune.models.load.download", lambda *asked: there[asked])
    done = cli("pack", "org/model", "--revision", "v1", "--token", "secret", "-o", "other", "--quiet")
    assert done.exit_code == 0 and (tmp_path / "other" / PACKED_INDEX).is_file(), done.output
