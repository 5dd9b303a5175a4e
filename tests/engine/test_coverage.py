"""Experts in the engine: how many tokens each saw, what becomes of those that saw too few, what each is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import Zoo, logits, token_batches, token_rows

from obsprune.core.linalg import damped
from obsprune.core.patterns import NofM, Pattern, Unstructured
from obsprune.core.statistics import Gram
from obsprune.engine import streams as streams_module
from obsprune.engine.coverage import POLICIES, Coverage
from obsprune.engine.layerwise import Projection, prune_blocks
from obsprune.engine.rundir import RunDir
from obsprune.engine.streams import OneStream, Streams, TwoStreams
from obsprune.models.experts import ExpertMatrix
from obsprune.models.load import load
from obsprune.models.walk import Walk
from obsprune.progress import Silent
from obsprune.ranks import ALONE
from obsprune.solvers import SOLVERS, build

Batches = list[dict[str, Tensor]]
FEW: Batches = [{"input_ids": token_rows(1, 3)}]
"""Three tokens, two experts each: most of six experts get one or none."""


class Whole:
    """A plain model, all of it in memory, and what enters its layers of experts: hidden states and choice."""

    def __init__(self, directory: Path) -> None:
        self.model = load(str(directory))
        self.blocks = self.model.blocks

    def entering(self, batches: Batches, index: int) -> tuple[Tensor, Tensor]:
        """(hidden states [T, H], chosen experts [T, K]) of one block over all batches."""
        found: list[tuple[Tensor, Tensor]] = []
        (experts,) = self.blocks[index].experts
        hook = experts.module.register_forward_pre_hook(
            lambda _, args, kwargs: found.append((*args, *kwargs.values())[:2]), with_kwargs=True
        )
        for batch in batches:
            logits(self.model.network, batch)
        hook.remove()
        return torch.cat([hidden for hidden, _ in found]), torch.cat([chosen for _, chosen in found])

    def matrices(self, index: int) -> dict[str, ExpertMatrix]:
        """By their names inside the layer of experts."""
        own = [matrix for matrix in self.blocks[index].matrices if isinstance(matrix, ExpertMatrix)]
        return {matrix.name.removeprefix(f"{matrix.layer}."): matrix for matrix in own}

    def inner(self, index: int, expert: int, x_TH: Tensor) -> Tensor:
        """What enters the last matrix of a Mixtral expert."""
        both = [self.matrices(index)[f"{expert}.{name}"].read() for name in ("gate_proj", "up_proj")]
        gate, up = (x_TH @ W_RC.T for W_RC in both)
        return torch.nn.functional.silu(gate) * up


def engine(
    directory: Path, output: Path, streams: Streams, coverage: Coverage, pattern: Pattern, solver: str = "sparsegpt"
) -> tuple[dict[str, Tensor], RunDir]:
    """{matrix: weight [R, C]} of a one-shot run, and its journal."""
    model, run = load(str(directory)), RunDir.open(output, directory)
    run.start({}, {}, [block.name for block in model.blocks], 0)
    patterns = {matrix.name: pattern for matrix in model.matrices}
    prune_blocks(model, streams, Projection(build(solver, {}), patterns, coverage), run, Silent())
    again = load(str(directory))
    return {
        matrix.name: weights[matrix.name]
        for block in again.blocks
        for weights in [block.weights(run.committed(block.name))]
        for matrix in block.matrices
    }, run


def test_tokens_are_counted_by_expert(zoo: Zoo, tmp_path: Path) -> None:
    """The first block's counts are those of the dense model; each block's add up to K a token."""
    batches = token_batches(5)
    _, run = engine(zoo("mixtral"), tmp_path / "out", OneStream(batches), Coverage(), Unstructured(0.5))
    whole = Whole(zoo("mixtral"))
    with whole.model.loaded():
        _, chosen_TK = whole.entering(batches, 0)
    entries = [entry for event in run.events if event["kind"] == "block" for entry in event["coverage"]]
    assert [entry["layer"] for entry in entries] == [f"model.layers.{index}.mlp.experts" for index in range(2)]
    assert entries[0]["tokens"] == [chosen_TK.flatten().tolist().count(expert) for expert in range(6)]
    assert [sum(entry["tokens"]) for entry in entries] == [2 * 5 * 48] * 2
    assert all(entry["fewest"] == 48 for entry in entries)  # the widest matrix: 48 inputs
    assert all(entry["starved"] == [e for e, n in enumerate(entry["tokens"]) if n < 48] for entry in entries)
    pruned = [matrix for event in run.events if event["kind"] == "block" for matrix in event["matrices"]]
    seen = {matrix["name"]: matrix["tokens"] for matrix in pruned}
    assert all(seen[f"{entry['layer']}.{e}.down_proj"] == n for entry in entries for e, n in enumerate(entry["tokens"])
               if e not in entry["starved"])  # fmt: skip


def test_counting_runs_no_expert(zoo: Zoo) -> None:
    model = load(str(zoo("mixtral")))
    with Walk(model.network, [block.module for block in model.blocks], token_batches(1)) as walk:
        stop, block = next(iter(walk)), model.blocks[0]
        with block.loaded(model.device):
            activated: list[Any] = []
            block.experts[0].module.act_fn.register_forward_hook(lambda *_: activated.append(1))
            facts = Coverage(fewest=10**6).measure(stop, stop.keys, block, ALONE)
            assert not activated and facts[0]["starved"] == list(range(6))
            stop.run(0)
            assert activated


@pytest.mark.parametrize(("policy", "everywhere"), [("all_tokens", {1, 4}), ("wanda", set()), ("skip", set())])
def test_marks_are_put_back(zoo: Zoo, policy: str, everywhere: set[int]) -> None:
    block = load(str(zoo("mixtral"))).blocks[0]
    (experts,) = block.experts
    coverage = Coverage(POLICIES[policy])
    coverage.recall(block, [{"layer": experts.layer, "starved": [1, 4]}])
    assert experts.starved == {1, 4} and experts.everywhere == everywhere
    both = [*block.matrices, *block.left]
    assert {matrix.name.split(".")[-2] for matrix in both if matrix.starved} == {"1", "4"}
    assert {matrix.starved for matrix in block.matrices} == ({False} if policy == "skip" else {False, True})
    assert all(not matrix.starved for matrix in block.left if not isinstance(matrix, ExpertMatrix))
    coverage.recall(block, [])
    assert not experts.starved and not experts.everywhere


def test_one_shot_is_as_by_hand(zoo: Zoo, tmp_path: Path) -> None:
    """Experts 0 and 3 of the first block are made to starve: their Grams are those of all tokens."""
    batches, directory = token_batches(6), zoo("mixtral")
    whole, solver = Whole(directory), build("sparsegpt", {})
    with whole.model.loaded():
        hidden_TH, chosen_TK = whole.entering(batches, 0)
        counts = [int((chosen_TK == expert).sum()) for expert in range(6)]
        fewest = sorted(counts)[2]  # two experts saw fewer
        coverage = Coverage(fewest=fewest)
        found, run = engine(directory, tmp_path / "out", OneStream(batches), coverage, Unstructured(0.5))
        starved = run.recorded("block", name="model.layers.0")["coverage"][0]["starved"]  # type: ignore[index]
        assert starved == [expert for expert in range(6) if counts[expert] < fewest] and starved
        for name, matrix in whole.matrices(0).items():
            expert = int(name.split(".")[0])
            tokens = (chosen_TK == expert).any(1) if expert not in starved else torch.ones(len(hidden_TH)).bool()
            x = hidden_TH[tokens] if not name.endswith("down_proj") else whole.inner(0, expert, hidden_TH[tokens])
            gram = Gram(x.shape[1])
            gram.add(x)
            answer = solver.solve(matrix.read(), solver.prepare(gram), Unstructured(0.5)).weight
            differ = ((answer - found[matrix.name]).abs() > 1e-3).float().mean()
            assert float(differ) < 0.01, name


def test_targets_follow_the_pruned_model_s_tokens(zoo: Zoo, tmp_path: Path) -> None:
    """Experts of the first block: x what the pruned model sends there, y the dense model's for the very same tokens."""
    batches, judges, directory = token_batches(10)[:8], token_batches(10)[8:], zoo("mixtral")
    streams, coverage = TwoStreams(batches, judges, 0.01, residual=False), Coverage(fewest=0)
    found, _ = engine(directory, tmp_path / "out", streams, coverage, Unstructured(0.5))
    dense, sparse, solver = Whole(directory), Whole(directory), build("sparsegpt", {})
    with dense.model.loaded(), sparse.model.loaded():
        for matrix in sparse.blocks[0].matrices:
            if not isinstance(matrix, ExpertMatrix):
                matrix.write(found[matrix.name])  # attention comes first
        (Y, _), (X, chosen) = dense.entering(batches, 0), sparse.entering(batches, 0)
        (V, _), (U, judged) = dense.entering(judges, 0), sparse.entering(judges, 0)
        for expert in range(6):
            sent, asked = (chosen == expert).any(1), (judged == expert).any(1)
            pairs = [(Y[sent], X[sent], V[asked], U[asked])]
            for group, names in enumerate((("gate_proj", "up_proj"), ("down_proj",))):
                if group:
                    y, x, v, u = pairs[0]
                    inner = [(one.inner(0, expert, rows)) for one, rows in
                             ((dense, y), (sparse, x), (dense, v), (sparse, u))]  # fmt: skip
                    pairs = [tuple(inner)]  # type: ignore[list-item]
                y, x, v, u = (part.double() for part in pairs[0])
                H, K, J, L = x.T @ x, y.T @ x, u.T @ u, v.T @ u
                own = {name: dense.matrices(0)[f"{expert}.{name}"].read().double() for name in names}
                moves = {n: torch.linalg.solve(damped(H, 0.01), (W @ (K - H)).T).T for n, W in own.items()}
                gain = sum(float((M * (own[n] @ (L - J))).sum()) for n, M in moves.items())
                cost = sum(float(((M @ J) * M).sum()) for M in moves.values())
                share, state = min(max(gain / cost, 0), 0.75) if cost else 0, solver.prepare(Gram.of(H, len(x)))
                for name, W in own.items():
                    answer = solver.solve(W + share * moves[name], state, Unstructured(0.5)).weight.float()
                    ours = found[f"model.layers.0.mlp.experts.{expert}.{name}"]
                    assert float(((answer - ours).abs() > 1e-3).float().mean()) < 0.02, (expert, name)
                    sparse.matrices(0)[f"{expert}.{name}"].write(ours)


@pytest.mark.parametrize("two", [False, True], ids=["one stream", "two streams"])
def test_few_experts_at_a_time_change_no_bit(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two: bool
) -> None:
    batches = token_batches(8)

    def run(name: str) -> dict[str, Tensor]:
        streams = TwoStreams(batches[:6], batches[6:], 0.01, residual=True) if two else OneStream(batches)
        return engine(zoo("qwen2_moe"), tmp_path / name, streams, Coverage(), Unstructured(0.5))[0]

    whole = run("whole")
    measured: list[int] = []
    plain = streams_module.few_at_a_time

    def counted(*given: Any) -> Any:
        parts = plain(*given)
        measured.append(len(parts))
        return parts

    monkeypatch.setattr(streams_module, "few_at_a_time", counted)
    monkeypatch.setattr(streams_module, "free_bytes", lambda device: 4 * 40_000)
    few = run("few")
    assert max(measured) > 1
    assert all(torch.equal(whole[name], few[name]) for name in whole)


def test_a_group_never_waits_for_memory_that_will_not_come(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "free_bytes", lambda device: 0)
    groups = [[matrix] for matrix in load(str(zoo("mixtral"))).matrices]
    assert streams_module.few_at_a_time(groups, 1, ALONE) == [[group] for group in groups]
    assert streams_module.few_at_a_time([], 1, ALONE) == []


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_experts_without_a_token(zoo: Zoo, tmp_path: Path, policy: str, solver: str) -> None:
    """Every solver prunes on, and what becomes of the starved is what the policy says."""
    directory, coverage, pattern = zoo("mixtral"), Coverage(POLICIES[policy]), NofM(2, 4)
    found, run = engine(directory, tmp_path / "out", OneStream(FEW), coverage, pattern, solver)
    (facts,) = run.recorded("block", name="model.layers.0")["coverage"]  # type: ignore[index]
    assert 0 in facts["tokens"] and facts["starved"] == list(range(6)) and facts["fate"] == POLICIES[policy].fate
    dense = {name: weight for block in load(str(directory)).blocks for name, weight in block.weights().items()}
    for name, weight in found.items():
        if policy == "skip" and "experts" in name:
            assert torch.equal(weight, dense[name])
        else:
            assert bool(((weight != 0).reshape(len(weight), -1, 4).sum(-1) == 2).all())
    unseen = [expert for expert, count in enumerate(facts["tokens"]) if not count]
    assert facts["unseen"] == (unseen if policy == "wanda" else [])
    name = f"model.layers.0.mlp.experts.{unseen[0]}.up_proj"
    if policy == "wanda":  # nothing is known of its inputs: the smallest weights go
        assert torch.equal(found[name], dense[name] * pattern.keep(dense[name].abs()))


def test_wanda_for_the_starved_alone(zoo: Zoo, tmp_path: Path) -> None:
    batches, runs = token_batches(6), {}
    for name, policy, fewest, solver in (
        ("mixed", "wanda", 80, "sparsegpt"),
        ("plain", "all_tokens", 0, "sparsegpt"),
        ("wanda", "all_tokens", 0, "wanda"),
    ):
        coverage = Coverage(POLICIES[policy], fewest)
        runs[name] = engine(zoo("mixtral"), tmp_path / name, OneStream(batches), coverage, Unstructured(0.5), solver)
    found, run = runs["mixed"]
    (facts,) = run.recorded("block", name="model.layers.0")["coverage"]  # type: ignore[index]
    assert 0 < len(facts["starved"]) < 6
    for name in (name for name in found if "layers.0.mlp.experts" in name):
        like = "wanda" if int(name.split(".")[-2]) in facts["starved"] else "plain"
        assert torch.equal(found[name], runs[like][0][name]), name
