"""Allocation in whole runs: the budget, the judge, and what a kill leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from zoo import Zoo, reference

from obsprune.core.patterns import Unstructured
from obsprune.engine import allocation
from obsprune.engine.allocation import RULES, Probe, Rule, Shares, exact, sizes_of
from obsprune.engine.rundir import RunDir
from obsprune.errors import InputError
from obsprune.models.load import DEMO, load, locate
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe


def pruned(source: Path, tokens: Path, output: Path, rules: list[str], **settings: Any) -> dict[str, Any]:
    data = {"dataset": str(tokens), "nsamples": 12, "seqlen": 32, "heldout": 6}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["none"], "sparsity": 0.7,
            "allocation": {"rules": rules}}  # fmt: skip
    return prune(make_recipe(tree, settings), output, Silent())


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*.safetensors")}


class Odd(Rule):
    """The first block loses nearly all, the last one less."""

    def shares(self, probe: Probe) -> Shares:
        names = list(sizes_of(probe.blocks))
        return dict(zip(names, [0.95] * (len(names) // 2) + [0.4] * len(names), strict=False))


class Even(Rule):
    """Uniform shares over again: never a whole margin better."""

    def shares(self, probe: Probe) -> Shares:
        return dict.fromkeys(sizes_of(probe.blocks), probe.sparsity)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_rule_prunes_exactly_as_much_as_uniform(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, family: str
) -> None:
    monkeypatch.setattr(allocation, "MARGIN", -100.0)  # whatever it leads to, it is not set aside for uniform
    report = pruned(zoo(family), tokens, tmp_path / "out", [rule])
    state = reference(tmp_path / "out").state_dict()
    weights = [state[f"{matrix['name']}.weight"] for matrix in report["matrices"]]
    assert sum(int((W == 0).sum()) for W in weights) == sum(Unstructured(0.7).pruned(*W.shape) for W in weights)
    for matrix, W in zip(report["matrices"], weights, strict=True):
        assert matrix["zeros"] == int((W == 0).sum())
    assert report["allocation"]["rule"] == rule and set(report["allocation"]["tried"]) == {"uniform", rule}
    assert not (tmp_path / "out/rounds").exists()


def test_a_bad_rule_is_tried_and_not_taken(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "odd", Odd())
    monkeypatch.setitem(RULES, "even", Even())
    text = {"data": {"dataset": str(locate(DEMO) / "calibration.txt"), "nsamples": 16, "seqlen": 128}}
    report = pruned(Path("demo"), tokens, tmp_path / "out", ["odd", "even"], **text)
    tried = report["allocation"]["tried"]
    assert report["allocation"]["rule"] == "uniform"
    assert tried["odd"]["nll"] > tried["uniform"]["nll"] == tried["even"]["nll"]
    plain = pruned(Path("demo"), tokens, tmp_path / "plain", [], **text)
    assert plain["allocation"] == {"rule": "uniform", "tried": {}}
    assert shards(tmp_path / "out") == shards(tmp_path / "plain")


def test_a_good_rule_is_taken(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where uniform is beaten: the demo model at 80 %, and a rule that is told which blocks to spare."""
    monkeypatch.setattr(allocation, "MARGIN", 1e-9)
    text = {"data": {"dataset": str(locate(DEMO) / "calibration.txt"), "nsamples": 16, "seqlen": 128}}
    report = pruned(Path("demo"), tokens, tmp_path / "out", ["knapsack"], sparsity=0.8, **text)
    tried = report["allocation"]["tried"]
    assert tried["knapsack"]["nll"] < tried["uniform"]["nll"]
    assert report["allocation"]["rule"] == "knapsack"
    assert len({round(matrix["sparsity"], 3) for matrix in report["matrices"]}) > 2


@pytest.mark.parametrize("sparsity", [0.05, 0.9, 0.99])
def test_extreme_targets(zoo: Zoo, tokens: Path, tmp_path: Path, sparsity: float) -> None:
    allocation = {"rules": ["owl", "importance", "knapsack"], "least": 0.0}
    report = pruned(zoo("llama"), tokens, tmp_path / "out", [], sparsity=sparsity, allocation=allocation)
    weights = [rows * columns for rows, columns in (matrix["shape"] for matrix in report["matrices"])]
    assert report["sparsity"]["zeros"] == sum(Unstructured(sparsity).pruned(1, weight) for weight in weights)


def test_a_single_block(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = pruned(zoo("gpt2"), tokens, tmp_path / "out", ["importance"], skip=[r"h\.1\."])
    assert {matrix["block"] for matrix in report["matrices"]} == {"transformer.h.0"}
    tried = report["allocation"]["tried"]
    assert tried["importance"] == tried["uniform"]


@pytest.mark.parametrize("die_at", range(6))
def test_killed_and_resumed_gives_the_same_bytes(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    """Killed before one of the lines of a journal, in a trial, between them, or while one is taken over."""
    monkeypatch.setattr(allocation, "MARGIN", -100.0)
    more = {"target": "stream", "matching": {"passes": 1}, "iters": 2, "rounds": {"steps": 2}}
    more |= {"data": {"dataset": str(tokens), "nsamples": 6, "seqlen": 32, "heldout": 6}}
    whole = pruned(zoo("opt"), tokens, tmp_path / "whole", ["owl"], **more)
    assert whole["allocation"]["rule"] == "owl"
    record, seen = RunDir.record, []

    def record_or_die(run: RunDir, kind: str, **payload: Any) -> Any:
        if kind in ("block", "trial", "allocation", "shot"):
            seen.append(kind)
            if len(seen) == [2, 3, 5, 7, 8, 10][die_at]:
                raise KeyboardInterrupt
        return record(run, kind, **payload)

    monkeypatch.setattr(RunDir, "record", record_or_die)
    with pytest.raises(KeyboardInterrupt):
        pruned(zoo("opt"), tokens, tmp_path / "killed", ["owl"], **more)
    monkeypatch.setattr(RunDir, "record", record)
    pruned(zoo("opt"), tokens, tmp_path / "killed", ["owl"], **more)
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")


def test_exact_keeps_the_budget_of_odd_sizes(zoo: Zoo) -> None:
    blocks = load(str(zoo("gpt2"))).blocks
    sizes = sizes_of(blocks)
    shares = exact(dict.fromkeys(sizes, 1 / 3), blocks, 1 / 3)
    assert all(abs(share * sizes[name] - round(share * sizes[name])) < 1e-9 for name, share in shares.items())
    assert sum(round(share * sizes[name]) for name, share in shares.items()) == sum(
        round(n / 3) for n in sizes.values()
    )


def test_it_applies_from_its_least_sparsity_up_and_to_unstructured_alone() -> None:
    tree = {"allocation": {"rules": ["owl"]}}
    assert make_recipe(tree, {"sparsity": 0.6}).rules == ["owl"]
    assert make_recipe(tree, {"sparsity": 0.5}).rules == []
    assert make_recipe(tree, {"sparsity": 0.7, "pattern": "row"}).rules == []
    assert make_recipe(tree, {"pattern": "1:4"}).rules == []
    assert make_recipe(tree, {"sparsity": 0.5, "allocation": {"least": 0.0}}).rules == ["owl"]
    for rules, least, message in (
        (["olw"], 0.6, r"'olw'; did you mean owl"),
        (["owl", "owl"], 0.6, "twice: owl, owl"),
        (["owl"], 2.0, r"allocation\.least is 2"),
    ):
        with pytest.raises(InputError, match=message):
            make_recipe({"allocation": {"rules": rules, "least": least}})
    with pytest.raises(InputError, match="'matching' is 5; a mapping with passes, steps, rate is expected"):
        make_recipe({"matching": 5})
    with pytest.raises(InputError, match=r"solver\.exact and solver\.refit"):
        make_recipe({"solver": {"exact": True, "refit": 10}})
