"""What is read off accuracies by method, seed and sparsity."""

from __future__ import annotations

from obsprune.studies.sweep import Sweep

LEVELS = [0.25, 0.48, 0.76, 0.95]
SWEEP = Sweep(
    LEVELS,
    {
        "magnitude": [[60.0, 50.0, 40.0, 30.0], [62.0, 52.0, 42.0, 32.0]],
        "better": [[61.0, 51.0, 44.0, 40.0], [61.0, 53.0, 46.0, 44.0]],
    },
)


def test_values() -> None:
    values = SWEEP.values()
    assert values["magnitude.mean"] == 46
    assert values["better.at.0.95"] == 42
    assert values["better.gain"] == ((196 - 180) + (204 - 188)) / 8
    assert (values["better.won"], values["better.lost"]) == (3, 0)  # at 0.25 once up and once down
    assert (values["magnitude.gain"], values["magnitude.won"]) == (0, 0)


def test_without_a_baseline_nothing_is_compared() -> None:
    alone = Sweep(LEVELS, {"better": SWEEP.runs["better"]})
    assert not [name for name in alone.values() if name.endswith((".gain", ".won", ".lost"))]
    assert alone.comparison() == []


def test_tables_show_the_nearest_levels_and_both_methods() -> None:
    table = SWEEP.table("t", {"magnitude": "a", "better": "b"})
    assert list(table.columns) == ["method", "48 %", "76 %", "95 %", "mean of all steps", "lr"]
    assert table.rows[1][:4] == ["better", "52 ± 1.4", "45 ± 1.4", "42 ± 2.8"]
    assert table.rows[1][-1] == "b"
    (comparison,) = SWEEP.comparison()
    assert comparison.rows[1] == ["better", "+4.00 ± 0.00", "3 of 4", "0 of 4"]


def test_panels_are_everything_and_the_high_end() -> None:
    whole, high = SWEEP.panels("t")
    assert list(whole.lines["better"].x) == LEVELS
    assert list(high.lines["better"].x) == [0.76, 0.95]
    assert high.lines["better"].low is not None and high.lines["better"].low[1] < 42
