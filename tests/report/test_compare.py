"""Runs beside one another: what may be compared, how it is tested, and what is said to differ."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kinds import KINDS
from runs import LOSSES, change_report, make_run

from obsprune.errors import InputError
from obsprune.evaluate.paired import paired
from obsprune.report import compare_page, said
from obsprune.report.compare import Beside, Comparison, Contest, _corrected, _falls, compare
from obsprune.report.runs import read_runs

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda name, *args, **changes: make_run(tmp_path / name, *args, **changes)


def compared(*paths: Path) -> Comparison:
    return compare(read_runs(paths))


def only(found: Comparison) -> Contest:
    (contest,) = found.contests
    return contest


def test_each_run_is_tested_against_the_first_item_by_item(make: Make) -> None:
    one, other = make("one", 0.1), make("other", 0.15, 0.6)
    contest = only(compared(one, other))
    (test,) = contest.tests
    mine, its = ([loss + worse * (1 + 0.2 * (i % 2)) for i, loss in enumerate(LOSSES)] for worse in (0.15, 0.1))
    expected = paired({"nll": mine}, {"nll": its})["nll"]
    assert (test.run, test.quantity, test.refused) == ("other", "nll", None)
    assert {key: getattr(test, key) for key in expected} == expected
    assert test.verdict == "worse" and only(compared(other, one)).tests[0].verdict == "better"


def test_a_difference_by_chance_is_none(make: Make) -> None:
    same = only(compared(make("one"), make("other")))
    assert (same.tests[0].p, same.tests[0].verdict) == (1.0, "no difference")


def test_many_tests_ask_for_more() -> None:
    values = (0.01, 0.024, 0.03, 0.04)  # Holm: 0.01 * 4 < 0.05, but 0.024 * 3 is not, and so all after it are not
    tests = [Beside(str(index), "nll", 1.0, 1.0, p, 9) for index, p in enumerate(values)]
    none = Beside("none", refused="x")
    verdicts = [test.verdict for test in _corrected([*tests[::-1], none])]
    assert verdicts == ["no difference"] * 3 + ["worse", "no test"]
    assert _corrected([Beside("one", "nll", -1.0, 1.0, 0.04, 9)])[0].verdict == "better"
    assert _corrected([Beside("one", "top1", -1.0, 1.0, 0.04, 9)])[0].verdict == "worse"


def test_the_front_is_what_nobody_beats(make: Make) -> None:
    paths = [make("small", 0.3, 0.7), make("middle", 0.1, 0.5), make("beaten", 0.2, 0.5), make("worst", 0.4, 0.6)]
    assert {score.run: score.best for score in only(compared(*paths)).scores} == {
        "small": True, "middle": True, "beaten": False, "worst": False,
    }  # fmt: skip


def test_more_is_better_for_accuracies(make: Make) -> None:
    def scored(hits: int) -> Callable[[dict[str, Any]], None]:
        return lambda report: [
            report["evaluation"]["heldout"][who].update(metric="top1", top1=value)
            for who, value in (("dense", 80.0), ("pruned", 10.0 * hits))
        ]

    contest = only(compared(*(change_report(make(name), scored(hits)) for name, hits in (("one", 3), ("other", 8)))))
    assert not contest.falls
    assert {score.run: score.best for score in contest.scores} == {"one": False, "other": True}
    assert [compare_page.change(score, contest) for score in contest.scores] == ["-50.000", "+0.000"]
    assert contest.tests[0].refused == "no scores of single items: other keeps none for this metric"


def test_of_some_metrics_less_is_better() -> None:
    falling = (
        "perplexity",
        "word_perplexity",
        "nll",
        "cross_entropy",
        "bits_per_byte",
        "top1_err",
        "wer",
        "brier_score",
    )
    rising = ("top1", "acc", "acc_norm", "exact_match", "f1", "bleu", "mc2", "answer")
    assert all(map(_falls, falling)) and not any(map(_falls, rising))


def test_what_is_not_finite_is_last_and_not_tested(make: Make) -> None:
    def broken(report: dict[str, Any]) -> None:
        report["evaluation"]["heldout"]["pruned"]["perplexity"] = None  # as JSON has it

    found = compared(make("one", sparsity=0.6), change_report(make("other"), broken), make("third", float("inf")))
    assert [(score.score is None, score.best) for score in only(found).scores] == [
        (False, True),
        (True, False),
        (True, False),
    ]
    assert [test.refused for test in only(found).tests] == [None, "not all scores of third are finite"]
    assert "not finite" in compare_page.make_page(found)
    json.dumps(found.tree(), allow_nan=False)


def test_a_score_that_is_not_finite_is_on_no_front(make: Make) -> None:
    found = only(compared(make("one"), make("smallest", float("inf"), 0.9)))
    assert [(score.run, score.best) for score in found.scores] == [("one", True), ("smallest", False)]


def test_a_run_without_scores_is_told_what_a_page_needs(make: Make) -> None:
    bare = change_report(make("bare"), lambda report: report["evaluation"].clear())
    (note,) = compared(make("one"), bare).notes
    assert "bare was not evaluated" in note and "needs a run that was pruned with --eval TASK" in note


def test_the_least_p_of_random_signs_is_a_bound(make: Make) -> None:
    (test,) = only(compared(make("one", dense=LOSSES * 3), make("other", 0.2, dense=LOSSES * 3))).tests
    assert compare_page.differing(test)[1] == "≤ 6.1e-05"
    assert said.probability(2**-13) == "0.00012", "of all signs it is what it is"


def test_the_method_is_more_than_its_solver(make: Make) -> None:
    found = compared(make("one"), make("rounds", rounds=[{"round": 1}, {"round": 2}]))
    assert [run["method"].partition(",")[0] for run in found.runs] == ["sparsegpt"] * 2
    assert found.runs[1]["method"].endswith(", 2 rounds") and "2 rounds" in compare_page.make_page(found)


def test_tasks_by_default_and_none_are_told_apart(make: Make) -> None:
    found = compared(make("one"), make("other", settings={"evaluation": ["none"]}))
    (one,) = found.differences
    assert [compare_page.setting(one, name) for name in ("one", "other", "third")] == ["default", "none", "–"]
    page = compare_page.make_page(found)
    assert "default" in page.partition("What is different")[2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seqlen": 64}, "seqlen 32 beside 64"),
        ({"stride": 16}, "stride 32 beside 16"),
        ({"sha256": "b" * 64}, "sha256 aaaaaaaaaaaa beside bbbbbbbbbbbb"),
        ({"limit": 3}, "limit None beside 3"),
    ],
)
def test_another_protocol_is_never_compared(make: Make, changes: dict[str, Any], said: str) -> None:
    found = compared(make("one"), make("other", **changes))
    assert [len(contest.scores) for contest in found.contests] == [1, 1]
    assert not any(contest.tests for contest in found.contests)
    (note,) = found.notes
    assert said in note and "must not be compared" in note and "obsprune eval" in note
    assert "a page needs runs that were pruned with --eval TASK" in note
    assert ("with another seed, number or length" in note) == ("sha256" in changes)
    page = compare_page.make_page(found)
    assert "Caution" in page and "Scores that no other run has" in page and "<svg" not in page


def test_other_models_are_shown_and_not_tested(make: Make) -> None:
    larger = {"model": {"parameters": 20_000, "source": "some/larger"}}
    found = compared(make("one"), make("other", **larger))
    assert found.models == ["model", "larger"]
    (test,) = only(found).tests
    assert test.refused == "of another dense model than one" and test.p is None
    assert "another dense model" in found.notes[0] and "20,000" in found.notes[0]
    assert all(score.best for score in only(found).scores), "each has a front of its own"


def test_dense_scores_say_which_model_it_is_not_names(make: Make) -> None:
    elsewhere = make("elsewhere", model={"source": "/a/copy/of-it"})
    tuned = make("tuned", dense=[loss * 1.01 for loss in LOSSES])  # the same name, other weights
    found = compared(make("one"), elsewhere, tuned)
    assert [run["model"] for run in found.runs] == [0, 0, 1]
    assert [test.refused for test in only(found).tests] == [None, "of another dense model than one"]


def test_without_a_journal_nothing_is_tested(make: Make) -> None:
    one, other = make("one"), make("other")
    (other / "progress.jsonl").unlink()
    assert only(compared(one, other)).tests[0].refused == (
        "no scores of single items: other came without its progress.jsonl"
    )


def test_heldout_flatters_what_it_chose(make: Make) -> None:
    found = compared(make("one"), make("rounds", rounds=[{"round": 1, "best": True}]))
    assert found.notes == [
        "heldout also chose which weights were kept of rounds, and flatters them; another text does not"
    ]
    assert compared(make("two"), make("three")).notes == []


def test_only_what_differs_is_listed(make: Make) -> None:
    wanda = make("wanda", settings={"solver": {"name": "wanda"}, "pattern": "unstructured"}, versions={"torch": "2.0"})
    found = {(one.part, one.key): one.values for one in compared(make("one"), wanda).differences}
    assert found["recipe", "solver.name"] == {"one": "sparsegpt", "wanda": "wanda"}
    assert found["versions", "torch"] == {"one": "1.0", "wanda": "2.0"}
    assert found["recipe", "solver.damping"] == {"one": 0.01}  # wanda has none
    assert all(key.startswith("solver.") or key == "torch" for _, key in found)
    same = compared(make("two"), make("three"))
    assert same.differences == [] and "Nothing: recipes, data" in compare_page.make_page(same)


def test_other_commands_do_not_flood_the_differences(make: Make) -> None:
    def tuned(report: dict[str, Any]) -> None:
        recipe = {key: report["recipe"][key] for key in ("model", "data", "evaluation", "seed")}
        report["recipe"] = recipe | {"tuning": {"teacher": None, "steps": 3}, "device": "auto"}

    found = compared(make("one"), change_report(make("tuned"), tuned))
    assert [(one.key, one.values) for one in found.differences] == [("command", {"one": "prune", "tuned": "finetune"})]


def test_values_survive_json(make: Make) -> None:
    found = compared(make("one"), make("other", 0.2, 0.7), make("third", sha256="b" * 64))
    tree = json.loads(json.dumps(found.tree(), allow_nan=False))
    assert tree["schema"] == 1 and [run["name"] for run in tree["runs"]] == ["one", "other", "third"]
    assert math.isclose(tree["runs"][1]["left"], 10_000 - round(8192 * 0.7)) and tree["runs"][0]["disk"] == 20_000


def test_packed_weights_are_called_so(make: Make) -> None:
    packed = make("packed")
    (packed / "obsprune.safetensors.index.json").write_text("{}")
    found = compared(make("one"), packed)
    assert [compare_page.size(run) for run in found.runs] == ["0.02 MB", "0.02 MB packed"]
    (packed / "model-00001-of-00001.safetensors").unlink()
    assert compare_page.size(compared(packed, make("other")).runs[0]) == "not here"


def test_runs_of_one_name_are_told_apart(make: Make) -> None:
    paths = [make("a/out"), make("b/out"), make("c")]
    assert [run.name for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "c"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: (path / "report.json").unlink(), "has no report.json"),
        (lambda path: (path / "report.json").write_text("{"), "is damaged"),
        (lambda path: (path / "report.json").write_text('{"schema": 99}'), "is not a report of this version"),
        (lambda path: (path / "progress.jsonl").write_text('{"kind": "end"}\n'), "without this file the run can still"),
    ],
)
def test_what_is_no_finished_run_is_refused(make: Make, spoil: Callable[[Path], Any], said: str) -> None:
    path = make("one")
    spoil(path)
    with pytest.raises(InputError, match=said):
        read_runs([path])


def test_an_unfinished_run_is_named_with_its_command(make: Make) -> None:
    with pytest.raises(InputError, match=r"unfinished run: repeat the command .* \(obsprune prune some/model\)"):
        read_runs([make("one", finished=False)])
    early = make("early", finished=False)
    (early / "report.json").unlink()
    with pytest.raises(InputError, match=r"early holds an unfinished run: repeat the command that began it$"):
        read_runs([early])


def test_a_run_is_named_once_and_must_be_there(make: Make, tmp_path: Path) -> None:
    path = make("one")
    with pytest.raises(InputError, match="named twice"):
        read_runs([path, path.parent / "one/../one"])
    with pytest.raises(InputError, match="there is no directory"):
        read_runs([tmp_path / "nowhere"])


def test_a_torn_line_of_a_journal_is_left_where_it_is(make: Make) -> None:
    path = make("one")
    journal = path / "progress.jsonl"
    torn = journal.read_bytes() + b'{"kind": "sco'
    journal.write_bytes(torn)
    assert read_runs([path])[0].events[-1]["kind"] == "end"
    assert journal.read_bytes() == torn


@pytest.mark.slow
def test_runs_of_every_kind_can_be_compared(made: Callable[[str], Path]) -> None:
    found = compared(*map(made, KINDS))
    assert [run["name"] for run in found.runs] == [made(kind).name for kind in KINDS]
    texts = {"one-shot", "rounds", "packed", "shares", "resumed", "several-processes"}
    together = next(contest for contest in found.contests if contest.reference == "one-shot")
    assert texts <= {score.run for score in together.scores} and all(s.dense is not None for s in together.scores)
    assert all(test.p is not None for test in together.tests if test.run in texts)
    assert next(test for test in together.tests if test.run == "resumed").p == 1.0, "the same bytes"
    assert any("not-evaluated was not evaluated" in note for note in found.notes)
    assert "finetune" in compare_page.make_page(found)


def test_letters_go_on_after_z() -> None:
    assert [compare_page._letters(place) for place in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]
