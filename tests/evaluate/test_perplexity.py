"""Perplexity against its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from zoo import Zoo, reference, token_rows

from obsprune.errors import InputError
from obsprune.evaluate import perplexity as module
from obsprune.evaluate import tasks
from obsprune.evaluate.perplexity import Perplexity
from obsprune.evaluate.tasks import Setting, check_name, make_task
from obsprune.models.load import Model, load
from obsprune.models.text import TokenSamples
from obsprune.progress import Silent


def text_task(name: str, model: Model, seqlen: int, limit: int | None = None) -> Perplexity:
    task = make_task(name, Setting(model, seqlen, lambda: (TokenSamples(token_rows(1)), ""), limit))
    assert isinstance(task, Perplexity)
    return task


def heldout_task(rows: Tensor, model: Model) -> Any:
    return make_task("heldout", Setting(model, 8, lambda: (TokenSamples(rows), "")))


@pytest.mark.parametrize("logit_bytes", [1, 2**16, 2**29])  # batches of one row, of a few, of all
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_definition(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, family: str, logit_bytes: int) -> None:
    monkeypatch.setattr(module, "LOGIT_BYTES", logit_bytes)
    rows = token_rows(7, seed=1)
    with torch.no_grad():
        losses = functional.log_softmax(reference(zoo(family))(rows).logits.double(), -1)
    nll = -losses[:, :-1].gather(-1, rows[:, 1:, None]).mean()
    found = Perplexity("rows", TokenSamples(rows), {}).score(load(str(zoo(family))), Silent(), "dense")
    assert found.values["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert found.values["predicted_tokens"] == 7 * 31
    of_rows = -losses[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1).mean(1)
    assert found.items["nll"] == pytest.approx(of_rows.tolist(), rel=1e-5)


def test_stories_on_the_oracles_rows(assets: Path, oracles: Path) -> None:
    expected = json.loads((oracles / "stories260k-sparsegpt.json").read_text())["dense"]
    model = load(str(assets / "stories260k"))
    task = text_task(f"text={oracles / 'stories260k-sparsegpt.safetensors'}:evaluation_input_ids", model, 256)
    score = task.score(model, Silent(), "dense").values
    assert score["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (score["sequences"], score["stride"], score["tokens"]) == (256, 256, 65536)


def test_the_text_gives_the_oracles_rows(assets: Path, oracles: Path) -> None:
    model = load(str(assets / "stories260k"))
    ours = text_task(f"text={assets / 'text/tinystories-evaluation.txt'}", model, 256, limit=256)
    theirs = text_task(f"text={oracles / 'stories260k-sparsegpt.safetensors'}:evaluation_input_ids", model, 256)
    assert torch.equal(ours.samples.ids, theirs.samples.ids)
    assert ours.protocol["sha256"] == theirs.protocol["sha256"]


def test_bad_tasks(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)  # with lm_eval, other words may be its tasks
    for name in ("heldout=3", "wikitxt", "", "c4="):
        with pytest.raises(InputError, match="unknown task"):
            check_name(name)
    for name in ("text", "text=", "imagenet"):
        with pytest.raises(InputError, match="names no file"):
            check_name(name)
    model = load(str(zoo("llama")))
    with pytest.raises(InputError, match="nothing was kept apart"):
        heldout_task(token_rows(0), model)
    for rows, says in ((token_rows(0), "shorter than one row"), (torch.tensor([[5, 500]]), "token ids 5…500")):
        save_file({"input_ids": rows}, tmp_path / "rows.safetensors")
        with pytest.raises(InputError, match=says):
            text_task(f"text={tmp_path / 'rows.safetensors'}", model, 8)
    with pytest.raises(InputError, match="consists of images and a llama model reads text"):
        make_task(f"imagenet={tmp_path}", Setting(model, 8, lambda: (TokenSamples(token_rows(1)), "")))
