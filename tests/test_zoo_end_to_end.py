"""Every family of the zoo, from checkpoint to sparse checkpoint; and what must not change a byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from zoo import ZOO, Zoo, logits, reference, shards, tensors, token_batches

from obsprune.engine.rundir import RunDir
from obsprune.models.corpora import Reading, open_corpus
from obsprune.models.data import draw
from obsprune.models.load import load
from obsprune.models.text import TokenSamples
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe


def pruned(source: Path, tokens: Path, output: Path, **settings: Any) -> dict[str, Any]:
    data = {"dataset": str(tokens), "nsamples": 16, "seqlen": 32, "heldout": 8}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["heldout"]} | settings
    return prune(make_recipe(tree), output, Silent())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("family", ZOO)
def test_every_family(zoo: Zoo, tokens: Path, tmp_path: Path, family: str, pattern: str) -> None:
    source, output = zoo(family), tmp_path / "out"
    files = shards(source)
    report = pruned(source, tokens, output, pattern=pattern)
    assert shards(source) == files
    before, after = tensors(source), tensors(output)
    assert {k: (t.dtype, t.shape) for k, t in before.items()} == {k: (t.dtype, t.shape) for k, t in after.items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    model = load(str(source))
    asked = {matrix.parameter for matrix in model.matrices}
    keys = {key for name in asked for key in model.names.sources[name]}
    assert changed == keys
    for key in keys:
        assert int((after[key] == 0).sum()) == round(0.5 * after[key].numel())
    assert [matrix["zeros"] for matrix in report["matrices"]] == [
        round(0.5 * matrix["shape"][0] * matrix["shape"][1]) for matrix in report["matrices"]
    ]
    reloaded, batch = reference(output), token_batches(1)[0]
    overwritten = AutoModelForCausalLM.from_pretrained(source).eval()
    for key in keys:
        overwritten.get_parameter(key).data.copy_(after[key])
    assert torch.equal(logits(reloaded, batch), logits(overwritten, batch))
    ours = load(str(output))
    with ours.lazily_loaded():
        assert torch.equal(logits(ours.network, batch), logits(reloaded, batch))
    assert report["evaluation"]["heldout"]["pruned"]["perplexity"] > 0


def test_names_and_forgotten_tensors_of_the_hub_come_back(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    """The hub's gpt2 says h.0… for transformer.h.0…, and keeps causal masks that no module has a place for any more."""
    source, output = tmp_path / "hub", tmp_path / "out"
    shutil.copytree(zoo("gpt2"), source)
    stored = {key.removeprefix("transformer."): tensor for key, tensor in tensors(zoo("gpt2")).items()}
    stored |= {f"h.{index}.attn.bias": torch.ones(1, 1, 64, 64).tril() for index in range(2)}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    pruned(source, tokens, output)
    pruned(zoo("gpt2"), tokens, tmp_path / "plain")
    after, plain = tensors(output), tensors(tmp_path / "plain")
    assert after.keys() == stored.keys()
    for key, tensor in after.items():
        assert torch.equal(tensor, plain[f"transformer.{key}"] if f"transformer.{key}" in plain else stored[key])


def test_what_is_evaluated_is_what_is_saved(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = pruned(zoo("llama"), tokens, tmp_path / "out")
    again = prune_rows(report, tokens)
    with torch.no_grad():
        loss = float(reference(tmp_path / "out")(again, labels=again).loss)
    assert report["evaluation"]["heldout"]["pruned"]["nll"] == pytest.approx(loss, rel=1e-5)


def prune_rows(report: dict[str, Any], tokens: Path) -> torch.Tensor:
    """The held-out rows, drawn as the recipe says and recognised by their hash."""
    corpus = open_corpus(str(tokens), Reading(lambda: None, 128, 32))
    held = draw(corpus, 16, 8, report["recipe"]["seed"]).heldout
    assert isinstance(held, TokenSamples) and held.content_hash() == report["data"]["heldout_sha256"]
    return held.ids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stored_dtype_is_kept(zoo: Zoo, tokens: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    pruned(zoo("llama", dtype), tokens, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {dtype}
    assert reference(tmp_path / "out").dtype == dtype


def test_same_seed_same_bytes_other_seed_other_bytes(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pruned(zoo("llama"), tokens, tmp_path / name, seed=seed)
    assert shards(tmp_path / "a") == shards(tmp_path / "b") != shards(tmp_path / "c")


class Killed(BaseException):
    """As sudden as a signal."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, dtype: torch.dtype
) -> None:
    """Killed in the middle of the commit number `after`."""
    source, commit = zoo("llama", dtype), RunDir.commit
    done: list[str] = []

    def fragile(self: RunDir, block: str, *rest: Any, **facts: Any) -> None:
        if len(done) == after:
            raise Killed
        commit(self, block, *rest, **facts)
        done.append(block)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "commit", fragile)
        with pytest.raises(Killed):
            pruned(source, tokens, tmp_path / "killed")
    assert not (tmp_path / "killed/config.json").exists()
    pruned(source, tokens, tmp_path / "killed")
    pruned(source, tokens, tmp_path / "whole")
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")


def test_the_batch_size_changes_no_mask_to_speak_of(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    for size in (1, 16):
        pruned(zoo("llama"), tokens, tmp_path / str(size), engine={"batch_size": size})
    one, all_ = tensors(tmp_path / "1"), tensors(tmp_path / "16")
    different = sum(int(((one[key] == 0) != (all_[key] == 0)).sum()) for key in one)
    assert different <= 4


def test_skipped_matrices_stay_dense(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    report = pruned(zoo("llama"), tokens, tmp_path / "out", skip=["layers.1", "down_proj$"])
    before, after = tensors(zoo("llama")), tensors(tmp_path / "out")
    changed = {key.removesuffix(".weight") for key in before if not torch.equal(before[key], after[key])}
    assert changed == {matrix["name"] for matrix in report["matrices"]}
    assert not any("layers.1." in name or name.endswith("down_proj") for name in changed)
    assert report["skipped"]["model.layers.0.mlp.down_proj"] == "matches --skip down_proj$"


def test_rounding_by_a_narrower_dtype_is_said(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    source = {"name": str(zoo("llama")), "dtype": "bfloat16"}
    report = pruned(zoo("llama"), tokens, tmp_path / "out", model=source)
    assert any("rounded" in warning for warning in report["warnings"])
    assert not pruned(zoo("llama"), tokens, tmp_path / "same")["warnings"]


def test_a_lost_shard_is_made_again_and_reported_once(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "finish", killed)
        with pytest.raises(Killed):
            pruned(zoo("llama"), tokens, tmp_path / "out")
    (tmp_path / "out/model-00002-of-00004.safetensors").unlink()
    report = pruned(zoo("llama"), tokens, tmp_path / "out")
    names = [matrix["name"] for matrix in report["matrices"]]
    assert len(names) == len(set(names)) == 21
