"""`obsprune bench-inference`."""

from __future__ import annotations

import json

from driver import Cli

WORK = ("--device", "cpu", "--batch-size", 1, "--prompt", 8, "--new", 2, "--repeats", 2)


def test_a_table_with_a_verdict_and_why(cli: Cli) -> None:
    shown = cli("bench-inference", "demo", *WORK, "--csr-from", 0)
    assert shown.exit_code == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert any(line.startswith("CSR") and "29 of 29" in line for line in lines)
    assert sum("baseline" in line for line in lines) == 2 and "semi-structured" in shown.stdout
    assert "Zeros in a dense tensor are multiplied" in lines[-1]
    assert "batch 1, a turn of as it is, CSR" in shown.stderr


def test_json_alone(cli: Cli) -> None:
    shown = cli("bench-inference", "demo", *WORK, "--json")
    found = json.loads(shown.stdout)
    assert shown.exit_code == 0 and not shown.stderr
    assert [row["phase"] for row in found["rows"]] == ["prefill", "decode"] and "80% zeros" in found["absent"]["CSR"]


def test_errors_are_one_sentence(cli: Cli) -> None:
    for words, said in (
        (("nowhere/at/all",), "there is no directory"),
        (("demo", "--prompt", 10_000), "room for 256 tokens"),
    ):
        shown = cli("bench-inference", *words)
        assert shown.exit_code == 2 and said in shown.stderr and len(shown.stderr.splitlines()) == 1
