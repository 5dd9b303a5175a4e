"""I-OBS rounds on tiny models: what they promise, where their weights live, and how they go on after a kill."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from zoo import SIDE_CHANNEL, ZOO, Zoo, reference, token_rows

from obsprune.cli.tables import prune_tables
from obsprune.core.patterns import Unstructured
from obsprune.engine import finetune
from obsprune.engine import place as place_module
from obsprune.engine.finetune import Tuning, search
from obsprune.engine.gradients import Sums, gradients, gradients_and_grams, whole_gradients
from obsprune.engine.layerwise import prune_blocks
from obsprune.engine.place import MEMORIES, Committed, Dense, InFiles, InHost, OnDevice, Place, Source, choose_place
from obsprune.engine.rounds import Rounds, describe, moved
from obsprune.engine.rundir import RunDir
from obsprune.engine.steps import Candidate, Local, Newton, Projection
from obsprune.engine.streams import OneStream
from obsprune.engine.teacher import HiddenStates, Lesson, teach
from obsprune.errors import WalkMismatch
from obsprune.evaluate.perplexity import Perplexity
from obsprune.models.blocks import Block
from obsprune.models.load import Model, load
from obsprune.models.text import TokenSamples
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe
from obsprune.solvers import build

QUICK = {"steps": 4}


def pruned(source: Path, tokens: Path, output: Path, **settings: Any) -> dict[str, Any]:
    data = {"dataset": str(tokens), "nsamples": 6, "seqlen": 32, "heldout": 6}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["none"], "iters": 2, "rounds": QUICK}
    return prune(make_recipe(tree, settings), output, Silent())


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*.safetensors")}


@pytest.fixture
def llama(zoo: Zoo) -> Model:
    return load(str(zoo("llama")))


@pytest.mark.parametrize("family", ZOO)
def test_never_above_one_shot(zoo: Zoo, tokens: Path, tmp_path: Path, family: str) -> None:
    report = pruned(zoo(family), tokens, tmp_path / "out")
    first, second = report["rounds"]
    best = next(entry for entry in report["rounds"] if entry["best"])
    assert best["heldout_kl"] <= first["heldout_kl"]
    assert second["kept"] == (second["heldout_kl"] < first["heldout_kl"])
    for matrix in report["matrices"]:
        assert matrix["zeros"] == round(0.5 * matrix["shape"][0] * matrix["shape"][1])
    judged = load(str(tmp_path / "out"))  # what was judged is what is saved
    place, dense = OnDevice(judged), load(str(zoo(family)))
    rows = TokenSamples(load_file(tokens)["input_ids"])
    with OnDevice(dense).opened():
        memory = teach(OnDevice(dense), rows, 4).memory
    with place.opened():
        lesson = teach(place, rows, 4)
        assert lesson.score(Dense()).kl == pytest.approx(0, abs=1e-6)
        assert isinstance(memory, HiddenStates)
        memory.head = judged.head
        assert replace(lesson, memory=memory).score(Dense()).kl > 0


@pytest.mark.parametrize("pattern", ["2:4", "row"])
@pytest.mark.parametrize("solver", ["sparsegpt", "wanda", "magnitude"])
def test_every_pattern_and_solver(zoo: Zoo, tokens: Path, tmp_path: Path, solver: str, pattern: str) -> None:
    report = pruned(zoo("llama"), tokens, tmp_path / "out", solver={"name": solver}, pattern=pattern)
    group = 4 if pattern == "2:4" else None
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, weight in load_file(path).items():
            if any(matrix["name"] == name.removesuffix(".weight") for matrix in report["matrices"]):
                zeros = (weight.view(-1, group or weight.shape[1]) == 0).sum(1)
                assert bool((zeros == zeros[0]).all()) and int(zeros[0]) == (group or weight.shape[1]) // 2
    assert [entry["round"] for entry in report["rounds"]] == [1, 2]


def test_same_seed_same_bytes_wherever_the_weights_live(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    results = []
    for memory in ("device", "device", "host", "disk"):
        output = tmp_path / f"{memory}{len(results)}"
        pruned(zoo("gpt2"), tokens, output, rounds=QUICK | {"memory": memory}, iters=3)
        results.append(shards(output))
        assert not (output / "rounds").exists()
    assert all(result == results[0] for result in results)
    assert results[0].keys() == {path.name for path in (tmp_path / "disk3").glob("*.safetensors")}


@pytest.mark.parametrize("rounds", [{"tune": "free"}, {"tune": "none"}, {"step": "none"}, {"step": "local"},
                                    {"tune": "free", "step": "none"}])  # fmt: skip
def test_every_form_of_a_round(zoo: Zoo, tokens: Path, tmp_path: Path, rounds: dict[str, Any]) -> None:
    report = pruned(zoo("opt"), tokens, tmp_path / "out", rounds=QUICK | rounds)
    first, second = report["rounds"]
    assert second["kept"] == (second["heldout_kl"] < first["heldout_kl"])
    assert (second["rate"] is None) == (rounds.get("tune") == "none") or not second["kept"]
    assert report["sparsity"]["reached"] == pytest.approx(0.5, abs=1e-3)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5, 6, 7])
def test_killed_and_resumed_gives_the_same_bytes(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Two blocks: the events are start, block, block, shot, round 1, round 2, round 3, block, block."""
    whole = pruned(zoo("qwen2"), tokens, tmp_path / "whole", iters=3)
    plain, left = RunDir.record, [after]

    def record(run: RunDir, kind: str, **payload: Any) -> Any:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return plain(run, kind, **payload | ({"seconds": 1000.0} if kind == "block" else {}))

    monkeypatch.setattr(RunDir, "record", record)
    monkeypatch.setattr(RunDir, "abandon", lambda run: None)
    with pytest.raises(Killed):
        pruned(zoo("qwen2"), tokens, tmp_path / "killed", iters=3)
    monkeypatch.setattr(RunDir, "record", plain)
    resumed = pruned(zoo("qwen2"), tokens, tmp_path / "killed", iters=3)
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert [entry["heldout_kl"] for entry in resumed["rounds"]] == [entry["heldout_kl"] for entry in whole["rounds"]]
    journal = [json.loads(line) for line in (tmp_path / "killed/progress.jsonl").read_text().splitlines()]
    rounds = [event["round"] for event in journal if event["kind"] == "round"]
    assert rounds == [1, 2, 3]  # none was done twice
    if after in (2, 3):  # one block was done, or both
        assert resumed["rounds"][0]["seconds"] > 1000 * (after - 1)


def samples(count: int, seed: int = 0) -> TokenSamples:
    return TokenSamples(token_rows(count, seed=seed))


def one_shot(model: Model, rows: TokenSamples, output: Path) -> tuple[RunDir, Projection]:
    run = RunDir.open(output, model.directory)
    run.start({}, {}, [block.name for block in model.blocks], 0)
    projection = Projection(build("sparsegpt", {}), {matrix.name: Unstructured(0.5) for matrix in model.matrices})
    streams = OneStream(rows.batches(4, model.device))
    prune_blocks(model, streams, projection, run, Silent())
    return run, projection


def test_a_full_local_step_on_the_same_sequences_is_one_shot(llama: Model, tmp_path: Path) -> None:
    rows = samples(8)
    run, projection = one_shot(llama, rows, tmp_path / "out")
    place = OnDevice(llama)
    with place.opened():
        lesson = teach(place, rows, 4)
        found = Local().candidates(Committed(run), lesson, projection, [0.5, 1.0], Silent())
        half, full = (
            {name: weight for block in llama.blocks for name, weight in candidate.weights.get(block).items()}
            for candidate in found
        )
    before = {name: weight for block in llama.blocks for name, weight in Committed(run).get(block).items()}
    assert all(torch.equal(full[name], before[name]) for name in before)
    assert not all(torch.equal(half[name], before[name]) for name in before)


def test_the_teacher_is_the_dense_model(llama: Model) -> None:
    rows = samples(6)
    place = OnDevice(llama)
    with place.opened():
        score = teach(place, rows, 4).score(Dense())
    assert score.kl == pytest.approx(0, abs=1e-7)
    assert score.agreement == 1
    assert score.nll == pytest.approx(Perplexity("rows", rows, {}).score(llama, Silent(), "").values["nll"], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])  # gemma2 caps its logits behind the head
def test_gradients_and_grams(zoo: Zoo, tmp_path: Path, family: str) -> None:
    """Against autograd and hooks on plain models; in chunks, the same bits."""
    model, rows = load(str(zoo(family))), samples(6)
    run, _ = one_shot(model, rows, tmp_path / "out")
    weights = Committed(run)
    student, teacher = reference(zoo(family)), reference(zoo(family))
    for block in model.blocks:
        tensors = weights.get(block)
        for matrix in block.matrices:
            student.get_parameter(matrix.parameter).data.copy_(tensors[matrix.name])
    with torch.no_grad():
        t = teacher(rows.ids, use_cache=False).logits.log_softmax(-1)
    s = student(rows.ids, use_cache=False).logits.log_softmax(-1)
    (t.exp() * (t - s)).sum().backward()
    found: list[dict[str, Sums]] = []
    for chunk in (3, 1):
        sums: dict[str, Sums] = {}
        place = InFiles(model, tmp_path / "scratch")
        with place.opened():
            gradients_and_grams(
                teach(place, rows, 2), chunk, weights, lambda block, got, sums=sums: sums.update({block.name: got})
            )
        found.append(sums)
    for block in model.blocks:
        one, other = (sums[block.name] for sums in found)
        for matrix in block.matrices:
            expected = student.get_parameter(matrix.parameter).grad
            torch.testing.assert_close(one.gradients[matrix.name], expected, rtol=1e-3, atol=1e-4)
            assert torch.equal(one.gradients[matrix.name], other.gradients[matrix.name])
        for (gram, group), (again, _) in zip(one.inputs.shared(), other.inputs.shared(), strict=True):
            assert gram.count == rows.ids.numel() and len(group) >= 1
            assert torch.equal(gram.H_CC, again.H_CC)


@pytest.mark.parametrize("family", ZOO)
def test_all_graphs_at_once_give_the_same_bits(zoo: Zoo, tmp_path: Path, family: str) -> None:
    model, rows = load(str(zoo(family))), samples(6)
    run, _ = one_shot(model, rows, tmp_path / "out")
    found: list[dict[str, Tensor]] = []
    place = OnDevice(model)
    with place.opened():
        lesson = teach(place, rows, 2)
        for differentiate in (gradients, whole_gradients):
            sums: dict[str, Tensor] = {}
            differentiate(
                lesson, (2, 0), Committed(run), lambda _: Sums(), lambda _, s, sums=sums: sums.update(s.gradients)
            )
            found.append(sums)
    assert found[0].keys() == found[1].keys() == {matrix.name for matrix in model.matrices}
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]) and bool(gradient.any())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize("free", [10**12, 10**3])
def test_graphs_are_kept_where_they_fit(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    used: list[str] = []
    for name in ("gradients", "whole_gradients"):
        original = getattr(finetune, name)
        monkeypatch.setattr(finetune, name, lambda *a, n=name, f=original: used.append(n) or f(*a))
    monkeypatch.setattr(place_module, "free_bytes", lambda device: free)
    run, _ = one_shot(llama, samples(6), tmp_path / "out")
    for place in (OnDevice(llama), InHost(llama)):
        with place.opened():
            Tuning(1, True).run(Committed(run), teach(place, samples(2), 1), [range(1)], 1e-3, lambda: None)
    assert used == ["whole_gradients" if free > 10**6 else "gradients", "gradients"]


def test_gradients_reach_pruned_weights_too(llama: Model, tmp_path: Path) -> None:
    run, _ = one_shot(llama, samples(6), tmp_path / "out")
    place, seen = OnDevice(llama), {}
    with place.opened():
        lesson = teach(place, samples(4, seed=1), 4)
        gradients(lesson, range(1), Committed(run), lambda block: Sums(), lambda block, s: seen.update(s.gradients))
    for block in llama.blocks:
        weights = Committed(run).get(block)
        for matrix in block.matrices:
            assert float(seen[matrix.name][weights[matrix.name] == 0].abs().min()) > 0


def test_fine_tuning_lowers_the_divergence_and_keeps_the_mask_if_told(llama: Model, tmp_path: Path) -> None:
    rows = samples(8)
    run, _ = one_shot(llama, rows, tmp_path / "out")
    place, before = OnDevice(llama), Committed(run)
    with place.opened():
        lesson = teach(place, rows, 1)
        steps: list[int] = []
        for masked in (True, False):
            tuning = Tuning(4, masked)
            shares = tuning.shares(lesson)
            assert [list(share) for share in shares] == [[0, 1], [2, 3], [4, 5], [6, 7]]
            after = tuning.run(before, lesson, shares, 1e-3, lambda: steps.append(1))
            assert lesson.score(after).kl < lesson.score(before).kl
            assert (moved(before, after, place) == 0) == masked
        assert len(steps) == 8
    assert [len(share) for share in Tuning(100, True).shares(lesson)] == [1] * 8


def test_search_climbs_from_the_middle_and_stops_at_the_first_rise() -> None:
    asked: list[float] = []

    def divergence(rate: float) -> float:
        asked.append(rate)
        return abs(rate - 3)

    assert search([1, 2, 3, 4, 5], divergence) == (3, 0)
    assert asked == [3, 4, 2]
    assert search([7, 8, 9, 10], divergence) == (7, 4)
    assert asked[3:] == [9, 10, 8, 7]
    assert search([-3, -2, -1, 1, 3, 6], divergence) == (3, 0)
    assert asked[7:] == [1, 3, 6]
    assert search([8], divergence) == (8, 5)


def test_step_sizes() -> None:
    assert Newton().sizes(None)[:3] == [0.0, 0.03, 0.1]
    assert Newton().sizes(0.9) == [0.0, pytest.approx(0.5), 0.9, pytest.approx(1.62)]
    assert Newton().sizes(0.0) == Newton().sizes(None)
    assert list(Newton(moves=False).sizes(0.3)) == [0.0]


def test_rounds_end_when_nothing_gets_better(llama: Model, tmp_path: Path) -> None:
    """Projection alone cannot improve on a projection: the second round is not kept, and no third is begun."""
    rows = samples(8)
    run, projection = one_shot(llama, rows, tmp_path / "out")
    before = shards(tmp_path / "out")
    place: Place = InHost(llama)
    with place.opened():
        rounds = Rounds(Newton(moves=False), None, projection, place, run, Silent(), 4, 4)
        rounds([rows, rows, rows], samples(4, seed=1), 1.0)
    last = run.recorded("round")
    assert last is not None and (last["round"], last["kept"]) == (2, False)
    assert "no better than round 1, which is kept" in describe(last, 4, 1)
    assert shards(tmp_path / "out") == before


def test_where_things_live(llama: Model, tmp_path: Path) -> None:
    kinds = {"device": OnDevice, "host": InHost, "disk": InFiles, "auto": OnDevice}
    assert set(kinds) == set(MEMORIES)
    for memory, kind in kinds.items():
        assert type(choose_place(llama, memory, 16, tmp_path)) is kind
    assert type(choose_place(llama, "auto", 10**12, tmp_path)) is InFiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(zoo: Zoo, tokens: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Bfloat16 is computed as it is, float16 in float32 on a CPU; masters are float32, the result is as stored."""
    report = pruned(zoo("llama", dtype), tokens, tmp_path / "out", rounds=QUICK | {"tune": "masked"})
    assert report["rounds"][1]["kept"]
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert all(tensor.dtype == dtype for tensor in load_file(path).values())


def test_what_gradients_cannot_follow_is_refused_before_anything_is_written(
    zoo: Zoo, tokens: Path, tmp_path: Path
) -> None:
    source = zoo.make("gemma3n-shared", SIDE_CHANNEL)
    with pytest.raises(WalkMismatch, match="only --iters 1"):
        pruned(source, tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_the_newest_rounds_weights_are_kept(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(run: RunDir, *_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        pruned(zoo("qwen2"), tokens, tmp_path / "out", iters=4)
    journal = [json.loads(line) for line in (tmp_path / "out/progress.jsonl").read_text().splitlines()]
    kept = [event["round"] for event in journal if event["kind"] == "round" and event["kept"]]
    assert len(kept) > 2
    assert [path.name for path in (tmp_path / "out/rounds").iterdir()] == [str(kept[-1])]


@pytest.mark.parametrize("masked", [True, False])
def test_a_rate_that_blows_up_is_passed_over(llama: Model, tmp_path: Path, masked: bool) -> None:
    """Infinite weights give infinite divergence, not an error: the round goes on without fine-tuning."""
    rows = samples(8)
    run, projection = one_shot(llama, rows, tmp_path / "out")
    place = OnDevice(llama)
    with place.opened():
        judge, lesson = teach(place, rows.take(range(4)), 2), teach(place, rows.take(range(4, 8)), 1)
        rounds = Rounds(Newton(), Tuning(4, masked), projection, place, run, Silent(), 4, 1)
        shares = rounds.tuning.shares(lesson)
        for part in (shares, shares[:1]):  # it shows in the next step's gradients, or after the last step
            assert rounds._pass(Committed(run), lesson, judge, part, 1e30)[1] == math.inf
        last = {"heldout_kl": judge.score(Committed(run)).kl, "rate": 1e30}
        assert rounds._tuned(Committed(run), lesson, judge, last)[1] is None


class Huge(Source):
    """Weights that no dtype can compute with."""

    def __init__(self, weights: Source) -> None:
        self.weights = weights

    def get(self, block: Block) -> dict[str, Tensor]:
        return {name: 1e30 * x for name, x in self.weights.get(block).items()}


@pytest.mark.parametrize(
    ("broken", "says"), [("point", "the gradient of .* is not finite"), ("result", "logits are not finite")]
)
def test_a_round_that_is_not_finite_ends_the_rounds(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, says: str
) -> None:
    """However patient, from there is no way on: the best iterate so far is the result, after a stop, too."""
    plain, finish, notices = Newton.candidates, Rounds._finish, list[str]()

    def third(self: Newton, weights: Source, lesson: Lesson, *rest: Any) -> list[Candidate]:
        calls.append(1)
        found = plain(self, Huge(weights) if len(calls) == 2 and broken == "point" else weights, lesson, *rest)
        for candidate in found if len(calls) == 2 else []:
            for block in lesson.place.model.blocks:
                candidate.weights.put(block, Huge(candidate.weights).get(block))
        return found

    def run() -> dict[str, Any]:
        rounds = QUICK | {"tune": "none", "patience": 5, "scored": True}
        return pruned(zoo("llama"), tokens, tmp_path / "out", rounds=rounds, iters=5, evaluation=["heldout"])

    calls = list[int]()
    monkeypatch.setattr(Newton, "candidates", third)
    monkeypatch.setattr(Silent, "notice", lambda _, text: notices.append(text))
    monkeypatch.setattr(Rounds, "_finish", lambda _: stopped())
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(Rounds, "_finish", finish)
    report = run()
    assert len(calls) == 2
    assert [entry["round"] for entry in report["rounds"]] == [1, 2, 3]
    assert report["rounds"][2]["heldout_kl"] is None and "Infinity" not in (tmp_path / "out/report.json").read_text()
    assert not report["rounds"][2]["kept"] and "scores" not in report["rounds"][2]
    best = next(entry for entry in report["rounds"] if entry["best"])
    assert best["scores"]["heldout"]["nll"] == report["evaluation"]["heldout"]["pruned"]["nll"]
    told = [notice for notice in notices if re.search(f"the rounds end with round 3: .*{says}", notice)]
    assert len(told) == 2  # the resumed run says so again
    row = {str(column.header): str(list(column.cells)[2]) for column in prune_tables(report)[0].columns}
    assert (row["KL"], row["heldout"]) == ("inf", "")


def stopped() -> None:
    raise KeyboardInterrupt


def test_targets_of_the_first_round_stay_in_the_report(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = pruned(zoo("llama"), tokens, tmp_path / "out", target="stream")
    assert report["rounds"][1]["best"]
    writers = {matrix["name"].rpartition(".")[2] for matrix in report["matrices"] if matrix["residual"]}
    assert writers == {"o_proj", "down_proj"}


def test_patience_goes_on_and_keeps_the_best(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    """With patience every round is done, from where the last one ended; the best one is the result."""
    rounds = QUICK | {"tune": "free", "step": "none", "patience": 5, "scored": True}
    report = pruned(zoo("llama"), tokens, tmp_path / "out", rounds=rounds, iters=6, evaluation=["heldout"])
    entries = report["rounds"]
    assert [entry["round"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    lowest = math.inf
    for entry in entries:
        assert entry["kept"] == (entry["heldout_kl"] < lowest)
        lowest = min(lowest, entry["heldout_kl"])
    assert not all(entry["kept"] for entry in entries)
    best = next(entry for entry in entries if entry["best"])
    assert best["heldout_kl"] == lowest
    final = report["evaluation"]["heldout"]["pruned"]
    assert best["scores"]["heldout"]["nll"] == final["nll"]  # what was scored is what was saved
    assert len({entry["scores"]["heldout"]["nll"] for entry in entries}) > 1
    assert not (tmp_path / "out/rounds").exists()


def test_one_round_of_patience_is_as_ever(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    """Scoring moves no bit, and nor does patience as long as every round is better."""
    pruned(zoo("llama"), tokens, tmp_path / "plain", iters=3)
    pruned(zoo("llama"), tokens, tmp_path / "scored", iters=3, rounds=QUICK | {"scored": True}, evaluation=["heldout"])
    assert shards(tmp_path / "plain") == shards(tmp_path / "scored")
