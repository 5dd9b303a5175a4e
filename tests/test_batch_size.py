"""The batch size that is found for a GPU: busy, but within its memory; a run that goes on keeps its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan import recipe
from zoo import Zoo

from obsprune import pipeline, resources
from obsprune.engine.footprint import shapes
from obsprune.models.load import load
from obsprune.models.text import TokenSamples
from obsprune.pipeline import prune
from obsprune.plan import Plan, make_plan
from obsprune.progress import Silent
from obsprune.resources import batch_size, fitted

USUAL = 2
"""Sequences of a batch where nothing is found."""


@pytest.fixture
def on_paper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if the CPU were a GPU with room for everything, on which a batch has usually two sequences."""
    monkeypatch.setattr(resources, "leaves_open", lambda plan: plan.recipe.engine.batch_size == "auto")
    monkeypatch.setattr(resources, "free_bytes", lambda device: 10**12)
    monkeypatch.setattr(TokenSamples, "together", property(lambda self: USUAL))
    return monkeypatch


def planned(zoo: Zoo, tokens: Path, **asked: Any) -> Plan:
    return make_plan(recipe(zoo("llama"), tokens, **asked))


def one(plan: Plan) -> Any:
    """The shapes of its only kind of block."""
    (found,) = shapes(plan.model, plan.model.batches(plan.draw.calibration.take([0]), 1)[0]).values()
    return found


def test_flops_of_a_block_are_those_of_its_products(zoo: Zoo, tokens: Path) -> None:
    plan = planned(zoo, tokens)
    layers = sum(2 * 32 * rows * columns for rows, columns in (m.shape for m in plan.model.blocks[0].matrices))
    assert layers <= one(plan).flops < 2 * layers  # attention's own products, too


@pytest.mark.parametrize(("times", "found"), [(1, 2), (2, 2), (4, 4), (7.9, 4), (8, 8), (1000, 8)])
def test_batches_grow_until_they_keep_a_gpu_busy(
    zoo: Zoo, tokens: Path, on_paper: pytest.MonkeyPatch, times: float, found: int
) -> None:
    plan = planned(zoo, tokens)
    on_paper.setattr(resources, "WORK", times * one(plan).flops)
    assert batch_size(plan) == found  # of 8 sequences
    matched = planned(zoo, tokens, matching={"passes": 1})
    assert batch_size(matched) == USUAL  # a step a batch


@pytest.mark.parametrize(("room", "found"), [(31, 4), (32, 8), (4, 1), (0, 1)])
def test_and_shrink_to_a_quarter_of_what_is_free(
    zoo: Zoo, tokens: Path, on_paper: pytest.MonkeyPatch, room: int, found: int
) -> None:
    plan = planned(zoo, tokens)
    graph = one(plan).graph
    on_paper.setattr(resources, "free_bytes", lambda device: room * graph)
    assert batch_size(plan) == found


def test_what_was_asked_for_or_begun_stays(zoo: Zoo, tokens: Path, on_paper: pytest.MonkeyPatch) -> None:
    assert fitted(planned(zoo, tokens, engine={"batch_size": 3})).batch_size == 3
    assert fitted(planned(zoo, tokens), known=5).batch_size == 5
    assert fitted(planned(zoo, tokens), known="auto").batch_size == 8
    on_paper.undo()
    plan = planned(zoo, tokens)
    assert fitted(plan, known=5) is plan  # on a CPU


def test_a_run_that_goes_on_keeps_its_batches(zoo: Zoo, tokens: Path, tmp_path: Path, on_paper: Any) -> None:
    asked, output = recipe(zoo("llama"), tokens, evaluation=["none"]), tmp_path / "out"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with on_paper.context() as patch:
        patch.setattr(pipeline.RunDir, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            prune(asked, output, Silent())
    on_paper.setattr(resources, "batch_size", lambda plan: 1)  # the memory is another's now
    report = prune(asked, output, Silent())
    assert report["recipe"]["engine"]["batch_size"] == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_small_model_gets_large_batches(zoo: Zoo, tokens: Path) -> None:
    plan = fitted(planned(zoo, tokens, engine={"device": "cuda"}, data={"nsamples": 8, "seqlen": 32}))
    assert plan.recipe.engine.batch_size == batch_size(plan) >= 8


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_attention_is_torchs_own(zoo: Zoo, family: str) -> None:
    """Which takes its fastest kernel by itself; nobody has to ask for it."""
    assert load(str(zoo(family))).network.config._attn_implementation == "sdpa"
