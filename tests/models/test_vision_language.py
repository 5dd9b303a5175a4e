"""Vision-language checkpoints: the language part becomes sparse, every other tensor keeps its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shapes import FAMILIES, made
from transformers import AutoModelForImageTextToText
from zoo import LLAMA, logits, tensors, token_batches

from obsprune.errors import InputError
from obsprune.models.kinds import VISION_LANGUAGE
from obsprune.models.load import load
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe


@pytest.mark.parametrize("tower", [None, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_part_is_pruned(family: str, tower: int | None, tokens: Path, tmp_path: Path) -> None:
    source, depth = made(family, tmp_path / "source", tower), FAMILIES[family][1]
    data = {"dataset": str(tokens), "nsamples": 16, "seqlen": 32, "heldout": 8}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["heldout"], "solver": {"name": "sparsegpt"}}
    report = prune(make_recipe(tree), tmp_path / "out", Silent())

    model = load(str(source))
    assert model.kind is VISION_LANGUAGE
    names = [f"model.language_model.layers.{index}.{layer}" for index in range(depth) for layer in LLAMA]
    assert sorted(matrix.name for matrix in model.matrices) == sorted(names)
    inside = {key for block in model.blocks for key in block.keys if key.endswith("_proj.weight")}
    before, after = tensors(source), tensors(tmp_path / "out")
    assert {key for key in before if not torch.equal(before[key], after[key])} == inside
    assert before.keys() == after.keys() and len(inside) == len(names)
    for key in inside:
        assert int((after[key] == 0).sum()) == after[key].numel() // 2

    assert report["model"]["kind"] == "vision-language model"
    assert any("only the language part is pruned" in warning for warning in report["warnings"])
    assert report["evaluation"]["heldout"]["pruned"]["perplexity"] > 0
    foreign = [name for name, why in report["skipped"].items() if why == "outside the language part"]
    assert foreign and all("vision" in name or "visual" in name or "projector" in name for name in foreign)
    batch = token_batches(1)[0]
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    ours = load(str(tmp_path / "out"))
    with ours.lazily_loaded():
        assert torch.equal(logits(ours.network, batch), logits(plain, batch))


def test_rounds_and_corrected_targets(tokens: Path, tmp_path: Path) -> None:
    source = made("llava", tmp_path / "source")
    data = {"dataset": str(tokens), "nsamples": 4, "seqlen": 32, "heldout": 4}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["none"], "iters": 2, "target": "stream"}
    report = prune(make_recipe(tree), tmp_path / "out", Silent())
    before, after = tensors(source), tensors(tmp_path / "out")
    assert len(report["rounds"]) == 2
    assert all(torch.equal(before[key], after[key]) for key in before if "vision" in key or "projector" in key)


@pytest.mark.parametrize("turned", [False, True], ids=["as the modules have it", "as the hub has it"])
def test_experts_of_a_language_part(tokens: Path, tmp_path: Path, turned: bool) -> None:
    """Qwen3-VL-MoE's experts lie the other way round on the hub: they go back there as they came."""
    source = made("qwen3_vl_moe", tmp_path / "source")
    if turned:
        stored = {k: t.transpose(1, 2).contiguous() if ".experts." in k else t for k, t in tensors(source).items()}
        save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    data = {"dataset": str(tokens), "nsamples": 8, "seqlen": 32, "heldout": 4}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["none"], "pattern": "2:4"}
    prune(make_recipe(tree), tmp_path / "out", Silent())
    before, after = tensors(source), tensors(tmp_path / "out")
    for key in (key for key in before if ".experts." in key):
        assert after[key].shape == before[key].shape
        inputs_last = after[key].transpose(1, 2) if turned else after[key]
        assert bool(((inputs_last != 0).reshape(-1, 4).sum(-1) == 2).all())
    assert all(torch.equal(before[key], after[key]) for key in before if ".visual." in key)
    ours, plain = load(str(tmp_path / "out")), AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    plain.set_experts_implementation("eager")
    with ours.lazily_loaded():
        assert torch.equal(logits(ours.network, token_batches(1)[0]), logits(plain, token_batches(1)[0]))


def test_a_language_part_of_encoder_and_decoder_is_refused(tmp_path: Path) -> None:
    source = made("llava", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["is_encoder_decoder"] = True
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="an encoder and a decoder"):
        load(str(source))
