"""`obsprune bench`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from driver import Cli

SMALL = ("--device", "cpu", "--nsamples", 4, "--seqlen", 32, "--set", "data.heldout=2", "--workdir", ".")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    from obsprune.bench import ceilings, growth
    from obsprune.models.shapes import SHAPES

    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["llama-2-7b"].reduced, dtype="float32"))
    monkeypatch.setitem(ceilings.SIZES, "cpu", ceilings.Sizes(64, 2**16))
    monkeypatch.setitem(growth.GRIDS, "cpu", growth.Grid((64, 128), (2, 4), 32, "float32"))


def test_tables_of_ceilings_phases_and_methods(cli: Cli, tmp_path: Path) -> None:
    shown = cli("bench", "--shape", "tiny", "--method", "sparsegpt", "--method", "balanced", "--blocks", 1, *SMALL)
    assert shown.exit_code == 0, shown.stderr
    for said in ("ceilings of this machine", "Gflop/s", "sparsegpt: tiny, 1 of 2 blocks", "balanced: tiny", "reached",
                 "scaled to 2 blocks", "4 x 32 samples", "threads:"):  # fmt: skip
        assert said in shown.stdout, said
    assert any(line.startswith("sweep ") for line in shown.stdout.splitlines())
    assert not any(tmp_path.iterdir())


def test_json_alone_and_in_a_file(cli: Cli, tmp_path: Path) -> None:
    shown = cli("bench", "--shape", "tiny", "--method", "sparsegpt", *SMALL, "--json", "-o", "bench.json")
    found = json.loads(shown.stdout)
    assert shown.exit_code == 0 and not shown.stderr
    assert [one["method"] for one in found["methods"]] == ["sparsegpt"] and found["shape"] == "tiny"
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_dry_run_says_what_it_would_take(cli: Cli) -> None:
    shown = cli("bench", "--shape", "tiny", "--dry-run", *SMALL)
    assert shown.exit_code == 0 and "host memory, best" in shown.stdout and "one pass over" in shown.stdout
    found = json.loads(cli("bench", "--shape", "tiny", "--dry-run", *SMALL, "--json").stdout)
    assert found["checkpoint_bytes"] > 0 and set(found["memory"]) == {"sparsegpt", "balanced", "iobs", "best"}


def test_growth_as_a_table_and_in_a_file(cli: Cli) -> None:
    shown = cli("bench", "--growth", "--device", "cpu", "--workdir", ".", "-o", "growth.json")
    assert shown.exit_code == 0, shown.stderr
    assert "growth, sparsegpt" in shown.stdout and "solve ~ d^" in shown.stdout
    assert len(json.loads(Path("growth.json").read_text())["points"]) == 4


def test_errors_are_one_sentence(cli: Cli) -> None:
    for words, said in (
        (("--shape", "llama"), "unknown shape 'llama'"),
        (("--shape", "tiny", "--method", "quick"), "unknown method 'quick'"),
        (("--shape", "tiny", "--set", "data.nsamples=none"), "nsamples"),
        (("--growth", "--shape", "tiny"), "leave --shape and --blocks out"),
        (("--growth", "--dry-run"), "--growth has no --dry-run"),
        (("--shape", "tiny", "-o", "nowhere/bench.json"), "there is no directory"),
    ):
        shown = cli("bench", *words, "--device", "cpu")
        assert shown.exit_code == 2 and said in shown.stderr and len(shown.stderr.splitlines()) == 1
