"""Checkpoints pruned by whole recipes: what is asked of prune, what comes out, and that nothing is done twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from obsprune.errors import InputError
from obsprune.models.shapes import SHAPES
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.studies import pruning
from obsprune.studies.kept import Kept
from obsprune.studies.material import Material
from obsprune.studies.pruned import Case, best, figures, rounds, tables, values
from obsprune.studies.pruning import Pruning, Subject

SMALL = Pruning(
    shape="llama-2-7b",
    tiny=True,
    common={"data": {"nsamples": 4, "heldout": 2, "seqlen": 16}, "rounds": {"steps": 2, "patience": 9, "scored": True}},
    forms={"newton": {"iters": 3, "rounds": {"tune": "none"}}, "once": {}},
    patterns=[0.5, "2:4"],
)


def report(heldout: list[float], scores: list[float], dense: float = 1.0) -> dict[str, Any]:
    lowest = heldout.index(min(heldout))
    rounds = [
        {"round": n, "heldout_kl": kl, "best": n == lowest + 1, "scores": {"text=a": {"metric": "ppl", "ppl": score}}}
        for n, (kl, score) in enumerate(zip(heldout, scores, strict=True), 1)
    ]
    pair = {"dense": {"metric": "ppl", "ppl": dense}, "pruned": {"metric": "ppl", "ppl": scores[lowest]}}
    seconds = {"total": 5.0, "allocation": 0.5, "pruning": 1.0, "rounds": 2.5, "evaluation": 9.0}
    return {"rounds": rounds, "evaluation": {"text=a": pair}, "sparsity": {"reached": 0.5}, "seconds": seconds}


def test_values_are_means_over_the_seeds_as_far_as_all_go() -> None:
    case = Case("newton", 0.5)
    found = values({case: [report([3, 2, 4], [9, 7, 8]), report([3, 1], [11, 5])]})
    assert found["dense.text"] == 1 and found["newton.0.5.text"] == 6
    assert found["newton.0.5.text.round1"] == 10 and found["newton.0.5.kl.round2"] == 1.5
    assert "newton.0.5.kl.round3" not in found
    last = report([3, 2], [9, 7])
    last["rounds"].append({"round": 3, "heldout_kl": None, "best": False})  # its logits were not finite
    assert rounds(last) == {"kl": {1: 3, 2: 2}, "text": {1: 9, 2: 7}}
    assert found["newton.0.5.seconds"] == 4 and found["newton.0.5.round"] == 2


def test_the_best_round_is_starred() -> None:
    case = Case("newton", 0.5)
    told = {case: [report([3, 2, 4], [9, 7, 8])]}
    assert best(told[case][0]) == 2
    by_round = tables(told)[-1]
    assert [row[1] for row in by_round.rows] == [9, "7 *", 8]
    line = figures("m", told)[-1].panels[0].lines["newton"]  # type: ignore[attr-defined]
    assert (line.star, line.y) == (1, [9, 7, 8])


def test_a_labels_file_is_divided(tmp_path: Path) -> None:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for index in range(10):
        Image.new("RGB", (4, 4)).save(images / f"{index}.png")
    rows = "".join(f"images/{index}.png\t{index}\n" for index in range(10))
    (tmp_path / "data" / "labels.tsv").write_text(rows)
    subject = Subject("on/hub", "imagenet={data}/labels.tsv", []).within(Material(tmp_path / "data"))
    parts = subject.divided(tmp_path)
    names = [[line.split("\t")[1] for line in Path(part.partition("=")[2]).read_text().splitlines()]
             for part in (parts.dataset, *parts.evaluation)]  # fmt: skip
    assert names == [["0", "1", "5", "6"], ["2", "3", "4", "7", "8", "9"]]


def test_what_is_missing_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no a\.txt"):
        Subject("m", "{data}/a.txt", []).within(Material(tmp_path))
    with pytest.raises(InputError, match=r"has no m/config\.json"):
        Subject("m", "", []).within(Material(tmp_path))
    assert Subject("meta/m", "", []).within(Material(tmp_path)).model == "meta/m"
    with pytest.raises(InputError, match="iters"):
        replace(SMALL, forms={"newton": {"iters": 0}}).require(Material())


def test_a_stopped_experiment_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished is not done again, unless something else is asked; the numbers are those of a quiet run."""
    (tmp_path / "tiny").mkdir()
    SHAPES["llama-2-7b"].tiny(tmp_path / "tiny")
    study = replace(SMALL, tiny=False, model="tiny", dataset="{data}/tiny/tokens.safetensors", evaluation=["heldout"])
    asked: list[str] = []

    def counted(recipe: Any, output: Path, *rest: Any) -> dict[str, Any]:
        asked.append(output.name.rpartition("-")[0])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return prune(recipe, output, *rest)

    monkeypatch.setattr(pruning, "prune", counted)
    material = Material(tmp_path, work=tmp_path / "unfinished")
    with pytest.raises(KeyboardInterrupt):
        study.run(material, Silent())
    outcome = study.run(material, Silent())
    assert asked == ["newton.0.5-0", "newton.2:4-0", "once.0.5-0", "once.0.5-0", "once.2:4-0"]
    assert not (tmp_path / "unfinished").exists()
    monkeypatch.setattr(pruning, "prune", prune)
    again = study.run(Material(tmp_path), Silent()).values
    same = {name: value for name, value in outcome.values.items() if not name.endswith("seconds")}
    assert same == {name: again[name] for name in same}
    assert outcome.values["newton.0.5.heldout.round1"] == outcome.values["once.0.5.heldout"]
    assert "newton.0.5.kl.round3" in outcome.values
    assert not [fact for fact in outcome.facts.items() if str(tmp_path) in str(fact)]
    assert "{data}/tiny/tokens" in outcome.facts["data"]


def test_another_question_is_not_answered_by_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the same one about other data, or about another model of that name."""
    (tmp_path / "tiny").mkdir()
    SHAPES["llama-2-7b"].tiny(tmp_path / "tiny")
    (tmp_path / "rows.txt").write_text("one")
    (tmp_path / "kept").mkdir()
    study = replace(SMALL, tiny=False, model="tiny", dataset="{data}/tiny/tokens.safetensors",
                    evaluation=["text={data}/rows.txt"], forms={"once": {}}, patterns=[0.5])  # fmt: skip
    answers = iter(range(9))
    monkeypatch.setattr(pruning, "prune", lambda *_: {"answer": next(answers)})

    def answer(study: Pruning = study) -> int:
        subject = study.subject.within(Material(tmp_path))
        kept = Kept(tmp_path / "kept", subject.stamps())
        return int(study._pruned(study.cases[0], 0, subject, kept, Silent())["answer"])

    assert [answer(), answer()] == [0, 0]
    other = replace(study, common={"data": {"nsamples": 5, "heldout": 2, "seqlen": 16}})
    assert [answer(other), answer(), answer(other)] == [1, 0, 1]
    (tmp_path / "rows.txt").write_text("another")
    assert [answer(), answer()] == [2, 2]
    (tmp_path / "tiny" / "config.json").touch()
    assert [answer(), answer()] == [3, 3]
