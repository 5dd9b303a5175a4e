"""Two streams: the dense model walks beside the pruned one, and layers are asked for the dense model's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from zoo import MIXTURES, ZOO, Zoo, logits, reference, token_batches

from obsprune.core.linalg import damped
from obsprune.core.patterns import Unstructured
from obsprune.core.statistics import Gram
from obsprune.engine.layerwise import Projection, prune_blocks
from obsprune.engine.rundir import RunDir
from obsprune.engine.streams import TwoStreams
from obsprune.models.load import load
from obsprune.models.walk import Walk
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe
from obsprune.solvers import build

GROUPS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
          ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip


def inputs_of(model: Any, batches: list[dict[str, Tensor]], name: str) -> Tensor:
    """All inputs [T, C] of one layer, float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for batch in batches:
        logits(model, batch)
    handle.remove()
    return torch.cat(seen).double()


def by_hand(directory: Path, batches: list[dict[str, Tensor]], judges: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Two plain models; group after group: measure in both, move the targets, overwrite in one."""
    dense, sparse, solver = reference(directory), reference(directory), build("sparsegpt", {})
    answers: dict[str, Tensor] = {}
    for index in range(ZOO["llama"].depth):
        for group in GROUPS:
            names = [f"model.layers.{index}.{layer}" for layer in group]
            (Y, X), (V, U) = (
                [inputs_of(model, rows, names[0]) for model in (dense, sparse)] for rows in (batches, judges)
            )
            H, K, J, L = X.T @ X, Y.T @ X, U.T @ U, V.T @ U
            weights = {name: dense.get_submodule(name).weight.detach().double() for name in names}
            moves = {name: torch.linalg.solve(damped(H, 0.01), (W @ (K - H)).T).T for name, W in weights.items()}
            gain = sum(float((M * (weights[name] @ (L - J))).sum()) for name, M in moves.items())
            cost = sum(float(((M @ J) * M).sum()) for M in moves.values())
            share, state = min(max(gain / cost, 0), 0.75) if cost else 0, solver.prepare(Gram.of(H, len(X)))
            for name, W in weights.items():
                answer = solver.solve(W + share * moves[name], state, Unstructured(0.5)).weight.float()
                sparse.get_submodule(name).weight.data.copy_(answer)
                answers[f"{name}.weight"] = answer
    return answers


def by_engine(
    directory: Path, output: Path, batches: list[dict[str, Tensor]], judges: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    model, run = load(str(directory)), RunDir.open(output, directory)
    run.start({}, {}, [block.name for block in model.blocks], 0)
    patterns = {matrix.name: Unstructured(0.5) for matrix in model.matrices}
    prune_blocks(
        model,
        TwoStreams(batches, judges, 0.01, residual=False),
        Projection(build("sparsegpt", {}), patterns),
        run,
        Silent(),
    )
    answers: dict[str, Tensor] = {}
    for path in output.glob("*.safetensors"):
        answers |= load_file(path)
    return {matrix.parameter: answers[matrix.parameter] for matrix in model.matrices}


def test_targets_are_as_by_hand(zoo: Zoo, tmp_path: Path) -> None:
    batches = token_batches(10)
    ours = by_engine(zoo("llama"), tmp_path / "out", batches[:8], batches[8:])
    theirs = by_hand(zoo("llama"), batches[:8], batches[8:])
    assert ours.keys() == theirs.keys()
    differ = sum(int(((ours[key] - theirs[key]).abs() > 1e-3).sum()) for key in ours)
    assert differ / sum(tensor.numel() for tensor in ours.values()) < 0.005  # near-ties: the sums there are float64


@pytest.mark.parametrize("family", ZOO | MIXTURES)
def test_the_dense_stream_is_the_dense_model(zoo: Zoo, family: str) -> None:
    """Bit for bit, while every matrix of the other stream is set to zero on the way."""
    model, plain, batches = load(str(zoo(family))), reference(zoo(family)), token_batches(2)
    streams = TwoStreams(batches[:1], batches[1:], 0.01, residual=True)
    found: dict[int, Tensor] = {}
    modules = [block.module for block in model.blocks]
    with Walk(model.network, modules, streams.batches, lambda key, out: found.update({key: out.logits})) as walk:
        for stop in walk:
            block = model.blocks[stop.index]
            with block.loaded(model.device):
                for stage in streams.stages(stop, block.matrices):
                    for matrix in (matrix for measured in stage.measured for matrix in measured.group):
                        matrix.write(torch.zeros(matrix.shape))
                stop.hand_on(streams.sparse)
    for key, batch in enumerate(batches):
        assert torch.equal(found[key], logits(plain, batch))
        assert not torch.equal(found[2 + key], found[key])


def pruned(source: Path, tokens: Path, output: Path, passes: int) -> dict[str, Any]:
    data = {"dataset": str(tokens), "nsamples": 16, "seqlen": 32, "heldout": 6}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["heldout"], "target": "stream"}
    return prune(make_recipe(tree, {"matching": {"passes": passes}}), output, Silent())


@pytest.mark.parametrize("passes", [0, 3])
def test_resumed_after_any_block(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    report = pruned(zoo("opt"), tokens, tmp_path / "whole", passes)
    assert any(matrix["correction"] > 0 for matrix in report["matrices"])
    assert bool(report["matching"]) == bool(passes)
    commit = RunDir.commit

    def commit_and_die(run: RunDir, *what: Any, **facts: Any) -> None:
        commit(run, *what, **facts)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "commit", commit_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pruned(zoo("opt"), tokens, tmp_path / "killed", passes)
    monkeypatch.setattr(RunDir, "commit", commit)
    pruned(zoo("opt"), tokens, tmp_path / "killed", passes)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
