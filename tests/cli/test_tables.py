"""Tables of scores that tests of commands do not reach."""

from __future__ import annotations

from typing import Any

from obsprune.cli.tables import eval_table


def entry(**values: Any) -> dict[str, Any]:
    return {"metric": "exact_match", "exact_match": 0.5, "exact_match_stderr": None, "questions": 2, **values}


def test_groups_of_any_metric_and_without_standard_errors() -> None:
    part = {"exact_match": 0.25, "exact_match_stderr": None, "questions": 1}
    scores = {
        "model": "m",
        "compare": None,
        "tasks": {"bbh": {"model": entry(subjects={"maths": part}, num_fewshot=3)}},
    }
    text = eval_table(scores)
    assert "maths  0.2500" in text and "0.5000" in text and "num fewshot 3" in text and "None" not in text
