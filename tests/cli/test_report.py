"""`obsprune report`: the page of one run, and of several beside one another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from driver import Cli

PAGE = "<!doctype html>"


@pytest.fixture
def runs(pruned_demo: Path, tmp_path: Path) -> list[Path]:
    """A finished run, twice."""
    return [Path(shutil.copytree(pruned_demo, tmp_path / name)) for name in ("one", "other")]


def test_the_page_of_a_run_is_written_anew(cli: Cli, runs: list[Path]) -> None:
    page = runs[0] / "report.html"
    page.unlink(missing_ok=True)
    found = cli("report", runs[0])
    assert found.exit_code == 0, found.stderr
    assert found.stdout == f"{page}\n"
    assert page.read_text().lower().startswith(PAGE) and "demo" in page.read_text()
    elsewhere = cli("report", runs[0], "-o", "pages/one.html")
    assert elsewhere.stdout == "pages/one.html\n" and Path("pages/one.html").read_text() == page.read_text()


def test_several_runs_are_compared(cli: Cli, runs: list[Path]) -> None:
    found = cli("report", *runs)
    assert found.exit_code == 0, found.stderr
    assert found.stdout == "obsprune-out/comparison.html\n"
    page = Path("obsprune-out/comparison.html").read_text()
    assert page.lower().startswith(PAGE) and "2 runs compared" in page and "no difference" in page
    assert "heldout: perplexity, less is better" in found.stderr and "no difference" in found.stderr
    quiet = cli("report", *runs, "-q", "-o", "two.html")
    assert (quiet.stdout, quiet.stderr) == ("two.html\n", "") and Path("two.html").read_text() == page


def test_tables_in_a_file_are_folded_late_and_call_runs_by_letters(cli: Cli, runs: list[Path]) -> None:
    report = json.loads((runs[1] / "report.json").read_text())
    report["recipe"]["sparsity"] = 0.75
    (runs[1] / "report.json").write_text(json.dumps(report))
    told = cli("report", *runs).stderr.splitlines()
    assert [line for line in told if line != line.rstrip()] == []
    assert any(line.split()[:3] == ["A", "one", "demo"] for line in told)
    assert any(line.split()[:2] == ["A", "unstructured"] and line.endswith(" s") for line in told)
    assert ["A", "B"] in map(str.split, told) and ["sparsity", "0.5", "0.75"] in map(str.split, told)
    assert any("beside A" in line for line in told)


def test_a_page_may_go_home(cli: Cli, runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(runs[0].parent))
    assert cli("report", runs[0], "-o", "~/x.html").stdout == f"{runs[0].parent}/x.html\n"
    assert not Path("~").exists()


def test_machines_get_values_and_no_page(cli: Cli, runs: list[Path]) -> None:
    one = json.loads(cli("report", runs[0], "--json").stdout)
    assert one == json.loads((runs[0] / "report.json").read_text())
    both = json.loads(cli("report", *runs, "--json").stdout)
    assert both["schema"] == 1 and both["contests"][0]["tests"][0]["p"] == 1.0
    assert not Path("obsprune-out").exists()
    cli("report", *runs, "--json", "-o", "both.html")
    assert Path("both.html").is_file()


@pytest.mark.parametrize("name", ["page.txt", "report.json", "folder.html"])
def test_a_page_goes_to_a_file_for_pages(cli: Cli, runs: list[Path], name: str) -> None:
    Path("folder.html").mkdir()
    found = cli("report", runs[0], "-o", name)
    assert found.exit_code == 2 and "ends in .html" in found.stderr
    assert not Path(name).is_file()


def test_what_cannot_be_written_is_said(cli: Cli, runs: list[Path]) -> None:
    Path("file").write_text("")
    found = cli("report", *runs, "-o", "file/page.html")
    assert found.exit_code == 2 and "cannot make file" in found.stderr and "another --output" in found.stderr


def test_a_spoilt_report_is_no_traceback(cli: Cli, runs: list[Path]) -> None:
    report = json.loads((runs[1] / "report.json").read_text())
    for spoilt in ({**report, "evaluation": 3}, {key: value for key, value in report.items() if key != "sparsity"}):
        (runs[1] / "report.json").write_text(json.dumps(spoilt))
        found = cli("report", *runs)
        assert found.exit_code == 2 and "error: " in found.stderr and "Traceback" not in found.output
        assert str(runs[1]) in found.stderr


def test_names_of_runs_do_not_steer_the_terminal(cli: Cli, runs: list[Path]) -> None:
    odd = runs[1].rename(runs[1].with_name("\x1b[31mred[bold]"))
    found = cli("report", runs[0], odd)
    assert found.exit_code == 0 and "\x1b" not in found.output and "red[bold]" in found.stderr
