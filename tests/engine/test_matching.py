"""Block matching: against a plain loop with torch's own Adam, and what it promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zoo import SIDE_CHANNEL, Zoo, reference, token_batches

from obsprune.engine import matching
from obsprune.engine.matching import FLOOR, PATIENCE, Goals, Matched, Matching, hidden
from obsprune.engine.matching import distance as squared
from obsprune.errors import InputError
from obsprune.models.blocks import Block
from obsprune.models.load import load
from obsprune.models.walk import Stop, Walk
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.ranks import ALONE
from obsprune.recipe import make_recipe


def pruned(source: Path, tokens: Path, output: Path, **settings: Any) -> dict[str, Any]:
    data = {"dataset": str(tokens), "nsamples": 16, "seqlen": 32, "heldout": 6}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["none"]}
    return prune(make_recipe(tree, {"matching": {"passes": 3}}, settings), output, Silent())


@contextmanager
def at_first_block(
    directory: Path, work: int, judge: int, dtype: str = "auto"
) -> Iterator[tuple[Stop, Block, Goals, list[Any]]]:
    """The first block with half of its weights zero, what it gave when it was dense, and the calls."""
    model, batches = load(str(directory), dtype=dtype), token_batches(work + judge)
    with Walk(model.network, [block.module for block in model.blocks], batches) as walk:
        stop, block = next(iter(walk)), model.blocks[0]
        with block.loaded(model.device):
            outputs = {key: stop.run(key) for key in stop.keys}
            for matrix in block.matrices:
                W = matrix.read().clone()
                matrix.write(W * (W.abs() > W.abs().median()))
            goals = Goals({k: outputs[k] for k in range(work)}, {k: outputs[k] for k in range(work, work + judge)})
            yield stop, block, goals, [stop.call(key) for key in stop.keys]


def by_hand(module: Any, calls: list[Any], goals: Goals, passes: int, rate: float) -> list[float]:
    """Plain torch; the error on the judging batches before and after every pass."""
    parameters = dict(module.named_parameters())
    keep = {name: (p.detach() != 0) | (p.dim() == 1) for name, p in parameters.items()}
    groups = []
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        rms = float(parameter.detach()[parameter.detach() != 0].square().mean().sqrt())
        groups.append({"params": [parameter], "rms": rms, "name": name})
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def error() -> float:
        lost = total = 0.0
        for key, goal in goals.judge.items():
            with torch.no_grad():
                lost += float((hidden(module.forward(*calls[key][0], **calls[key][1])) - hidden(goal)).square().sum())
            total += float(hidden(goal).square().sum())
        return lost / total

    errors, order, step = [error()], torch.Generator().manual_seed(0), 0
    for _ in range(passes):
        for key in torch.randperm(len(goals.work), generator=order).tolist():
            output = module.forward(*calls[key][0], **calls[key][1])
            adam.zero_grad()
            (hidden(output) - hidden(goals.work[key])).square().sum().backward()
            share = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / (passes * len(goals.work))))
            for group in adam.param_groups:
                group["lr"] = rate * share * group["rms"]
                group["params"][0].grad.mul_(keep[group["name"]])
            adam.step()
            step += 1
        errors.append(error())
    return errors


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_as_by_hand(zoo: Zoo, family: str) -> None:
    with at_first_block(zoo(family), 3, 2) as (stop, block, goals, calls):
        plain = copy.deepcopy(block.module)
        plain.forward = type(plain).forward.__get__(plain)  # without the walk's meeting
        errors = by_hand(plain, calls, goals, 2, 0.02)
        found = Matching(2, 0.02)(stop, block, goals, ALONE, lambda text: None)
        assert (found.before, found.passes) == (pytest.approx(errors[0], rel=1e-5), 2)
        assert found.after == pytest.approx(min(errors), rel=1e-3)
        assert found.after < found.before
        assert errors[-1] == min(errors)  # so that the weights below are those of the last pass
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(block.module.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_that_do_not_fit_are_made_to(zoo: Zoo, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled by a power of two, the loss leads to the same weights, but for a step or two that overflowed."""
    found = []
    for factor in (1.0, 2.0**20):
        with at_first_block(zoo("llama"), 3, 2, dtype) as (stop, block, goals, _):
            monkeypatch.setattr(matching, "distance", lambda y, goal, f=factor: f * squared(y, goal))
            found.append(Matching(4, 0.02)(stop, block, goals, ALONE, lambda text: None))
    small, large = found
    assert small.after < 0.9 * small.before
    assert large.after == pytest.approx(small.after * 2**20, rel=0.1)


def test_nothing_is_kept_of_a_rate_that_is_too_high(zoo: Zoo) -> None:
    with at_first_block(zoo("llama"), 2, 2) as (stop, block, goals, _):
        before = {name: parameter.detach().clone() for name, parameter in block.module.named_parameters()}
        found = Matching(9, 100.0)(stop, block, goals, ALONE, lambda text: None)
        assert found == Matched(found.before, found.before, 0, PATIENCE)
        for name, parameter in block.module.named_parameters():
            assert torch.equal(parameter, before[name])
            assert not parameter.requires_grad and parameter.grad is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "gemma3", "bloom", "falcon-new"])
@pytest.mark.parametrize("target", ["own", "stream"])
def test_zeros_stay_and_blocks_come_nearer(zoo: Zoo, tokens: Path, tmp_path: Path, family: str, target: str) -> None:
    report = pruned(zoo(family), tokens, tmp_path / "out", target=target)
    before, after = reference(zoo(family)).state_dict(), reference(tmp_path / "out").state_dict()
    names = {f"{matrix['name']}.weight" for matrix in report["matrices"]}
    for name in names:
        assert int((after[name] == 0).sum()) == round(0.5 * after[name].numel())
    for entry in report["matching"]:
        assert entry["after"] <= entry["before"]
    assert any(entry["after"] < 0.95 * entry["before"] for entry in report["matching"])
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    vectors = {name for name in changed - names if before[name].dim() == 1}
    assert names <= changed and vectors and changed == names | vectors


def test_rounds_go_on_from_matched_norms(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    """The first round's divergence is that of the one-shot result, norms included; further rounds carry them along."""
    one = pruned(zoo("llama"), tokens, tmp_path / "one", target="stream", evaluation=["heldout"])
    tokens_two = {"data": {"dataset": str(tokens), "nsamples": 8, "seqlen": 32, "heldout": 6}}
    two = pruned(zoo("llama"), tokens, tmp_path / "two", iters=2, rounds={"steps": 4}, **tokens_two)
    same = pruned(zoo("llama"), tokens, tmp_path / "same", evaluation=["heldout"], **tokens_two)
    assert two["rounds"][0]["told"]["perplexity"] == pytest.approx(
        same["evaluation"]["heldout"]["pruned"]["perplexity"], rel=1e-5
    )
    assert one["matching"] and len(two["matching"]) == len(one["matching"])
    assert two["rounds"][1]["kept"]
    name = "model.layers.0.input_layernorm.weight"
    first, last = (load_file(next((tmp_path / d).glob("model-00002*")))[name] for d in ("same", "two"))
    assert torch.equal(first, last)
    assert not torch.equal(first, reference(zoo("llama")).get_parameter(name))


def test_biases_that_are_zero_learn_too(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    model = reference(zoo("gpt2"))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.zero_()
    model.save_pretrained(tmp_path / "zero")
    report = pruned(tmp_path / "zero", tokens, tmp_path / "out", matching={"passes": 5, "rate": 0.01})
    assert all(entry["best"] for entry in report["matching"])
    after = reference(tmp_path / "out")
    assert bool(after.get_parameter("transformer.h.0.mlp.c_fc.bias").any())


def test_side_channels_pass(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = pruned(zoo.make("gemma3n", SIDE_CHANNEL), tokens, tmp_path / "out")
    assert len(report["matching"]) == SIDE_CHANNEL.depth


def test_it_needs_held_out_text(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="held"):
        pruned(zoo("llama"), tokens, tmp_path / "out", data={"dataset": str(tokens), "seqlen": 32, "heldout": 0})
    with pytest.raises(InputError, match=r"matching\.rate"):
        pruned(zoo("llama"), tokens, tmp_path / "out", matching={"rate": 0.0})
