"""Checkpoints in shapes that are common and easily broken: many shards, a resized vocabulary, float16."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from zoo import ZOO, Zoo, logits, reference, tensors, token_batches

from obsprune.models.load import load, locate
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe


def pruned(source: Path, output: Path, data: dict[str, Any]) -> dict[str, torch.Tensor]:
    tree = {"model": {"name": str(source)}, "data": {"nsamples": 8, "seqlen": 32, "heldout": 4} | data,
            "solver": {"name": "sparsegpt"}, "evaluation": ["heldout"]}  # fmt: skip
    report = prune(make_recipe(tree), output, Silent())
    assert report["evaluation"]["heldout"]["pruned"]["perplexity"] > 0
    return tensors(output)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_shards_make_no_difference(zoo: Zoo, tokens: Path, tmp_path: Path, family: str) -> None:
    reference(zoo(family)).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    parted = pruned(tmp_path / "shards", tmp_path / "parted", {"dataset": str(tokens)})
    whole = pruned(zoo(family), tmp_path / "whole", {"dataset": str(tokens)})
    assert parted.keys() == whole.keys() == tensors(zoo(family)).keys()
    assert all(torch.equal(parted[key], whole[key]) for key in whole)
    assert ("lm_head.weight" in whole) is not ZOO[family].tied


def test_float16_is_computed_in_float32_and_cast_back(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    source, wide = zoo("llama", torch.float16), tmp_path / "wide"
    shutil.copytree(source, wide)
    stored = {key: tensor.float() for key, tensor in tensors(source).items()}
    save_file(stored, wide / "model.safetensors", metadata={"format": "pt"})
    narrow = pruned(source, tmp_path / "narrow", {"dataset": str(tokens)})
    expected = pruned(wide, tmp_path / "expected", {"dataset": str(tokens)})
    first = [key for key in narrow if ".layers.0." in key]  # later blocks see inputs that the cast has moved
    assert first and all(torch.equal(narrow[key], expected[key].half()) for key in first)
    assert all(tensor.dtype == torch.float16 for tensor in narrow.values())


def test_an_embedding_longer_than_the_tokenizer(tmp_path: Path) -> None:
    """As resize_token_embeddings(pad_to_multiple_of=…) makes it."""
    source, demo = tmp_path / "resized", locate("demo")
    model, words = reference(demo), len(AutoTokenizer.from_pretrained(demo))
    model.resize_token_embeddings(words + 32)
    model.save_pretrained(source)
    for path in demo.glob("tokenizer*"):
        shutil.copy(path, source / path.name)
    out = pruned(source, tmp_path / "out", {"dataset": str(demo / "calibration.txt")})
    before = tensors(source)
    assert out.keys() == before.keys() and len(out["model.embed_tokens.weight"]) == words + 32
    assert torch.equal(out["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    plain, ours, batch = reference(tmp_path / "out"), load(str(tmp_path / "out")), token_batches(1)[0]
    with ours.lazily_loaded():
        assert torch.equal(logits(ours.network, batch), logits(plain, batch))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == words and ours.classes == words + 32
