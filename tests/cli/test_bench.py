"""`obsprune bench`."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

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
        (("--growth", "--nsamples", 4), "has its own data.nsamples"),
        (("--growth", "--seqlen", 64), "has its own data.seqlen"),
        (("--set", "model.name=demo"), "has its own model.name"),
        (("--growth", "--dry-run"), "--growth has no --dry-run"),
        (("--shape", "tiny", "-o", "nowhere/bench.json"), "there is no directory"),
        (("--shape", "tiny", "-o", "."), "is no file; choose another -o"),
        (("--shape", "tiny", "-o", os.devnull), "is no file; choose another -o"),
    ):
        shown = cli("bench", *words, "--device", "cpu")
        assert shown.exit_code == 2 and said in shown.stderr and len(shown.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a directory is needed that not even root can write in")
@pytest.mark.parametrize("more", [(), ("--growth",), ("--dry-run",)])
def test_a_file_that_cannot_be_is_refused_before_anything_is_measured(
    more: tuple[str, ...], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obsprune.bench import growth, runs

    for module in (growth, runs):
        monkeypatch.setattr(module, "scratch", lambda *_: pytest.fail("it has begun"))
    shown = cli("bench", "--device", "cpu", *more, "-o", "/proc/self/bench.json")
    assert shown.exit_code == 2 and "cannot write in /proc/" in shown.stderr and len(shown.stderr.splitlines()) == 1


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_growth_leaves_its_points_and_says_that_it_begins_anew(
    sign: int, code: int, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obsprune.bench import growth

    real = growth._best

    def stopped(trials: Any) -> Any:
        if Path("growth.json").exists():
            os.kill(os.getpid(), sign)
        return real(trials)

    monkeypatch.setattr(growth, "_best", stopped)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        shown = cli("bench", "--growth", "--device", "cpu", "--workdir", ".", "-o", "growth.json", "--quiet")
    finally:
        signal.signal(signal.SIGINT, former)
    assert shown.exit_code == code
    assert shown.stderr.startswith("error: stopped; the same command begins anew") and shown.stderr.count("\n") == 1
    assert len(json.loads(Path("growth.json").read_text())["points"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["growth.json"]


def test_its_help_is_its_own(cli: Cli) -> None:
    shown = " ".join(cli("bench", "--help").stdout.split())
    assert "pruned and skipped" not in shown and "flops" in shown
