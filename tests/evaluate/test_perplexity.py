"""Perplexity against its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from zoo import Zoo, reference, token_rows

from obsprune.errors import InputError
from obsprune.evaluate import perplexity as module
from obsprune.evaluate.perplexity import perplexity
from obsprune.evaluate.tasks import check_name, rows_task, text_task
from obsprune.models.load import load
from obsprune.progress import Silent


@pytest.mark.parametrize("logit_bytes", [1, 2**16, 2**29])  # batches of one row, of a few, of all
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_definition(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, family: str, logit_bytes: int) -> None:
    monkeypatch.setattr(module, "LOGIT_BYTES", logit_bytes)
    rows = token_rows(7, seed=1)
    with torch.no_grad():
        losses = functional.log_softmax(reference(zoo(family))(rows).logits.double(), -1)
    nll = -losses[:, :-1].gather(-1, rows[:, 1:, None]).mean()
    score = perplexity(load(str(zoo(family))), rows, Silent())
    assert score["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert score["predicted_tokens"] == 7 * 31


def test_stories_on_the_oracles_rows(assets: Path, oracles: Path) -> None:
    expected = json.loads((oracles / "stories260k-sparsegpt.json").read_text())["dense"]
    model = load(str(assets / "stories260k"))
    task = text_task(f"text={oracles / 'stories260k-sparsegpt.safetensors'}:evaluation_input_ids", model, 256)
    score = task.score(model, Silent(), "dense")
    assert score["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (score["sequences"], score["stride"], score["tokens"]) == (256, 256, 65536)


def test_the_text_gives_the_oracles_rows(assets: Path, oracles: Path) -> None:
    model = load(str(assets / "stories260k"))
    ours = text_task(f"text={assets / 'text/tinystories-evaluation.txt'}", model, 256, limit=256)
    theirs = text_task(f"text={oracles / 'stories260k-sparsegpt.safetensors'}:evaluation_input_ids", model, 256)
    assert torch.equal(ours.rows, theirs.rows)
    assert ours.protocol["sha256"] == theirs.protocol["sha256"]


def test_bad_tasks(zoo: Zoo) -> None:
    for name in ("text", "text=", "imagenet", ""):
        with pytest.raises(InputError, match="unknown task"):
            check_name(name)
    model = load(str(zoo("llama")))
    with pytest.raises(InputError, match="shorter than one row"):
        rows_task("empty", token_rows(0), "", model)
    with pytest.raises(InputError, match="token ids 5…500"):
        rows_task("strange", torch.tensor([[5, 500]]), "", model)
