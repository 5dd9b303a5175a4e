"""What a page tells of each kind of run is what its report has; a part that is not there is not spoken of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import synthetic_report

from obsprune.report import pictures, said
from obsprune.report.drawings import Chart
from obsprune.report.heatmap import HeatMap
from obsprune.report.page import make_page, make_text
from obsprune.report.parts import Code, Facts, Figures, Marked, Notes, Part, Table, marked
from obsprune.report.sections import STORY, command, lead, make_sections

Report = dict[str, Any]
Made = Callable[[str], Path]
ALWAYS = {"summary", "scores", "matrices", "cost", "notes", "data", "repeat", "purpose"}


def read(made: Made, kind: str) -> Report:
    found: Report = json.loads((made(kind) / "report.json").read_text())
    return found


def parts(report: Report, name: str) -> list[Part]:
    return list(next(section.parts for section in make_sections(report) if section.name == name))


def cells(part: Part) -> list[list[str]]:
    assert isinstance(part, Table)
    return [[marked(cell).text for cell in row] for row in part.rows]


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("one shot", {"allocation", "damping"}),
        ("rounds", {"rounds", "matching", "allocation", "damping"}),
        ("experts", {"experts", "allocation", "damping"}),
        ("train-prune", {"steps"}),
        ("finetune", {"steps"}),
    ],
)
def test_sections_are_those_that_the_run_has(made: Made, kind: str, others: set[str]) -> None:
    names = [section.name for section in make_sections(read(made, kind))]
    assert set(names) == ALWAYS | others
    assert names == [name for name in STORY if name in names]


def test_the_best_round_has_the_star() -> None:
    """The paper's figure, with a round that is no better and one without weights."""
    report = synthetic_report(1, rounds=4)
    for entry, kl, perplexity, kept in zip(
        report["rounds"], (0.3, 0.1, 0.2, None), (7.0, 6.0, 6.5, None), (True, True, False, False), strict=True
    ):
        entry |= {"heldout_kl": kl, "told": {"perplexity": perplexity, "agreement": 0.8}, "kept": kept}
        entry["best"] = entry["round"] == 2
    figures, table = parts(report, "rounds")
    assert isinstance(figures, Figures)
    for chart in figures.drawings:
        assert isinstance(chart, Chart) and "★" in chart.title
        starred = [point.x for point in chart.series[0].points if point.star]
        assert starred == [2]
    divergence, perplexity, _ = figures.drawings
    assert isinstance(divergence, Chart) and isinstance(perplexity, Chart)
    assert [(point.x, point.y) for point in divergence.series[0].points] == [(1, 0.3), (2, 0.1), (3, 0.2)]
    assert [point.y for point in perplexity.series[0].points] == [7.0, 6.0, 6.5]
    assert isinstance(table, Table) and cells(table)[1][:3] == ["2 ★", "0.1000", "6.0000"]
    assert cells(table)[3][1] == "not finite"
    assert [all(isinstance(cell, Marked) for cell in row) for row in table.rows] == [False, True, False, False]


def test_the_dense_model_is_a_line_where_it_was_judged_on_the_same(made: Made) -> None:
    report = read(made, "rounds")
    charts = {chart.y: chart for chart in pictures.rounds(report) if isinstance(chart, Chart)}
    dense = report["evaluation"]["heldout"]["dense"]["perplexity"]
    assert charts["perplexity"].levels == charts["perplexity, heldout"].levels == {"dense": dense}
    assert charts["held-out KL"].levels == {} and charts["agreement"].levels == {}
    report["evaluation"]["heldout"]["dense"]["sha256"] = "0" * 64
    charts = {chart.y: chart for chart in pictures.rounds(report) if isinstance(chart, Chart)}
    assert charts["perplexity"].levels == {}


def test_heat_maps_have_every_matrix_where_it_belongs() -> None:
    report = synthetic_report(3)
    report["matrices"][8]["error"] = 0.9  # the second kind of the second block
    sparsity, error = pictures.matrices(report)
    assert isinstance(sparsity, HeatMap) and isinstance(error, HeatMap)
    assert len(sparsity.cells) == len(error.cells) == 21
    assert sparsity.corner == "kind" and sparsity.columns == ("0", "1", "2"), "the longer side is drawn downward"
    (worst,) = (cell for cell in error.cells if cell.value == 0.9)
    assert (error.rows[worst.row], error.columns[worst.column], worst.text) == ("self_attn.k_proj", "1", "0.9")
    assert worst.label == "model.layers.1.self_attn.k_proj: error 0.9"
    tall = pictures.matrices(synthetic_report(32))[0]
    assert isinstance(tall, HeatMap) and tall.corner == "depth" and len(tall.rows) == 32


def test_the_worst_matrices_come_first() -> None:
    report = synthetic_report(8)
    tables = [part for part in parts(report, "matrices") if isinstance(part, Table)]
    ranked = sorted(report["matrices"], key=lambda matrix: -matrix["error"])
    assert [row[0] for row in cells(tables[1])] == [matrix["name"] for matrix in ranked[:10]]
    assert len(cells(tables[2])) == 56 and tables[2].folded
    assert cells(tables[0])[0][:2] == ["self_attn.q_proj", "8"]


def test_scores_and_how_they_changed(made: Made) -> None:
    report = read(made, "one shot")
    table = parts(report, "scores")[0]
    pair = report["evaluation"]["heldout"]
    (first, second) = cells(table)
    dense, pruned = pair["dense"]["perplexity"], pair["pruned"]["perplexity"]
    assert first[:5] == ["heldout", "perplexity", f"{dense:.4f}", f"{pruned:.4f}", f"× {pruned / dense:.4f}"]
    assert second[4].startswith(f"{pair['pruned']['nll'] - pair['dense']['nll']:+.4f} ± ")
    assert first[5] == second[5] == f"{pair['paired']['nll']['p']:.2g}"
    assert first[6] == "4 × 32 tokens"


def test_a_score_that_is_not_finite_is_said() -> None:
    report = synthetic_report(1)
    scores = report["evaluation"]["wikitext2"]
    scores["pruned"] |= {"perplexity": None, "nll": None}
    scores |= {"ratio": None, "paired": {"nll": {"difference": None, "stderr": None, "p": None, "items": 3}}}
    (row,) = cells(parts(report, "scores")[0])
    assert row[2:6] == ["5.4720", "not finite", "× not finite", ""]
    assert "5.472 → not finite" in make_text(report)


def test_classifiers_are_told_by_what_was_measured(made: Made) -> None:
    names = [row[1] for row in cells(parts(read(made, "classifier"), "scores")[0])]
    assert names == ["top1", "top5", "cross_entropy"]


def test_experts_that_saw_too_few_tokens_are_marked(made: Made) -> None:
    report = read(made, "experts left dense")
    found = parts(report, "experts")
    (table,) = (part for part in found if isinstance(part, Table))
    for row, layer in zip(table.rows, report["coverage"], strict=True):
        assert marked(row[-2]).text == str(len(layer["starved"]))
        assert (marked(row[-2]).mark == "wrong") == bool(layer["starved"])
    assert any(layer["starved"] for layer in report["coverage"])
    assert "were left dense" in make_text(report)


def test_damping_that_was_more_than_asked_is_marked() -> None:
    report = synthetic_report(4)
    for matrix in report["matrices"]:
        matrix["damping"] = 0.01
    report["matrices"][3]["damping"] = 1.0
    (facts,) = parts(report, "damping")
    assert isinstance(facts, Facts)
    assert [marked(cell) for _, cell in facts.rows] == [
        Marked("0.01", ""), Marked("27 matrices", ""), Marked("1 matrix", "wrong")
    ]  # fmt: skip


def test_the_time_is_shared_out() -> None:
    report = synthetic_report(1)
    (bars,) = pictures.time(report)
    values = {bar.name: bar.value for bar in bars.bars}  # type: ignore[attr-defined]
    assert sum(values.values()) == pytest.approx(report["seconds"]["total"])
    assert list(values) == sorted(values, key=lambda name: -values[name])
    report["seconds"]["total"] = 10.0  # of a process that went on with a run
    assert "all else" not in str(pictures.time(report)[0])
    assert "before it was continued" in make_text(report)


def test_it_can_be_repeated(made: Made) -> None:
    for kind, name in {"one shot": "prune", "train-prune": "train-prune", "finetune": "finetune"}.items():
        report = read(made, kind)
        assert command(report) == name
        codes = [part.text for part in parts(report, "repeat") if isinstance(part, Code)]
        assert f"obsprune {name} --config recipe.yaml -o DIRECTORY" in codes
        assert codes[-1] == (made(kind) / "recipe.yaml").read_text()
        assert (codes[0] == report["command"]) == bool(report["command"])


def test_rules_that_were_tried(made: Made) -> None:
    report = read(made, "shares")
    (table,) = (part for part in parts(report, "allocation") if isinstance(part, Table))
    assert {row[0].removesuffix(" ★") for row in cells(table)} == {"uniform", "owl"}
    assert sum(row[0].endswith("★") for row in cells(table)) == 1
    report["allocation"]["rule"] = "owl"
    (chart,) = pictures.allocation(report)
    assert isinstance(chart, Chart) and len(chart.series[0].points) == len({m["block"] for m in report["matrices"]})
    assert chart.levels == {"all": report["sparsity"]["reached"]}


def test_what_is_packed_is_told_by_its_size(made: Made) -> None:
    report = read(made, "packed")
    assert "size on disk" in make_text(report) and f"{100 * report['packed']['share']:.2f} %" in make_text(report)
    assert "size on disk" not in make_text(read(made, "one shot"))


def test_nothing_to_warn_of_is_said() -> None:
    (notes,) = parts(synthetic_report(1) | {"warnings": []}, "notes")
    assert isinstance(notes, Notes) and notes.notes == ["There were no warnings."]


def test_solvers_are_part_of_pruning_without_rounds_alone() -> None:
    """After rounds a report has the matrices of the kept one: their time is no part of what stands above it."""
    report = synthetic_report(2, rounds=3)
    assert "of these, solvers alone" not in make_text(report)
    assert "in the round that was kept" in make_text(report)
    assert "of these, solvers alone" in make_text(report | {"rounds": []})


def test_all_that_was_done_is_named(made: Made) -> None:
    for kind, what in {
        "rounds": "sparsegpt, stream targets, block matching, 2 rounds",
        "one shot": "sparsegpt",
        "train-prune": "sparsegpt, 2 steps",
        "finetune": "finetuned, 4 steps",
    }.items():
        report = read(made, kind)
        assert f"({what}): " in lead(report)
        (fact,) = (text for name, text in facts(report, "summary") if name == "method")
        assert fact == f"obsprune {command(report)}, {what}"


def facts(report: Report, name: str) -> list[tuple[str, str]]:
    return [
        (key, marked(cell).text) for part in parts(report, name) if isinstance(part, Facts) for key, cell in part.rows
    ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"refit": 10, "exact": False}, "admm, refit 10"),
        ({"refit": 10, "exact": True}, "admm, exact refit"),
        ({"refit": 0, "compensate": True}, "admm, compensated biases"),
    ],
)
def test_what_is_done_beside_a_solver_is_named(settings: Report, told: str) -> None:
    report = synthetic_report(1, rounds=1) | {"rounds": []}
    report["recipe"]["solver"] = {"name": "admm"} | settings
    assert f"({told}): " in lead(report)
    report["allocation"]["rule"] = "owl"
    assert f"({told}, zeros shared out by owl): " in lead(report)


def test_what_has_no_number_is_said() -> None:
    """All that the schema lets be null, and more that `finite` may leave so."""
    report = synthetic_report(1, rounds=2)
    report["matching"] = [{"block": "0", "before": None, "after": None, "rate": 0.1}]
    report["allocation"]["tried"] = {"uniform": {"heldout_kl": None, "nll": None}}
    report["evaluation"]["wikitext2"]["paired"]["nll"]["stderr"] = None
    for matrix in report["matrices"]:
        matrix |= dict.fromkeys(("loss", "error", "damping", "seconds", "correction"))
    for entry in report["rounds"]:
        entry |= {"heldout_kl": None, "told": dict.fromkeys(entry["told"]), "step": None, "rate": None}
    assert "± " not in make_page(report) and "fell from" not in make_text(report)
    assert said.NOT_FINITE in make_text(report)
    report["matching"].append({"block": "1", "before": 3.0, "after": 2.0, "rate": 0.1})
    assert "fell from 3 to 2 in the mean" in make_text(report)


def test_uses_are_told_once(made: Made) -> None:
    for kind in ("one shot", "packed"):
        (notes,) = parts(read(made, kind), "purpose")
        assert isinstance(notes, Notes)
        assert sum("research" in note for note in notes.notes) <= 1
        assert sum("inference servers" in note for note in notes.notes) == 1
