"""Packed checkpoints read as any others, by all of obsprune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import CLASSIFIERS, Zoo, reference_classifier, shards, tensors, token_rows

from obsprune.engine.packing import pack
from obsprune.errors import InputError
from obsprune.eval_pipeline import evaluate_checkpoint
from obsprune.models.checkpoint import PACKED_INDEX
from obsprune.models.load import load, open_checkpoint
from obsprune.models.packed_layout import PACKED
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe


@pytest.fixture
def packed(zoo: Zoo, tmp_path: Path) -> Path:
    pack(zoo("llama"), tmp_path / "packed", Silent())
    return tmp_path / "packed"


def test_every_tensor_is_read_as_it_was(zoo: Zoo, packed: Path) -> None:
    checkpoint, expected = open_checkpoint(packed), tensors(zoo("llama"))
    found = checkpoint.read(reversed(checkpoint.headers))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    for name, header in checkpoint.headers.items():
        assert (header.dtype, header.shape) == (expected[name].dtype, tuple(expected[name].shape))
    assert checkpoint.fingerprint().keys() == {PACKED_INDEX, *(path.name for path in packed.glob("*.safetensors"))}


def test_the_files_beside_the_weights_are_those_of_the_dense_checkpoint(zoo: Zoo, tmp_path: Path) -> None:
    dense = zoo.classifier("deit", CLASSIFIERS["deit"])
    pack(dense, tmp_path / "packed", Silent())
    model = load(str(tmp_path / "packed"))
    assert model.processor.to_dict() == load(str(dense)).processor.to_dict()
    side = model.checkpoint.directory
    assert (side / "config.json").read_bytes() == (dense / "config.json").read_bytes()
    assert not (side / PACKED_INDEX).exists()
    pixels = torch.rand(1, 3, 32, 32)
    with model.loaded(), torch.no_grad():
        found, expected = (one(pixel_values=pixels).logits for one in (model.network, reference_classifier(dense)))
    assert torch.allclose(found, expected, atol=1e-5)  # rounding hangs on where in memory weights begin


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_pruning_one_gives_the_bytes_that_pruning_the_dense_one_gives(
    zoo: Zoo, tokens: Path, tmp_path: Path, family: str
) -> None:
    pack(zoo(family), tmp_path / "packed", Silent())
    data = {"dataset": str(tokens), "nsamples": 4, "seqlen": 32}
    for source, output in ((zoo(family), "of-dense"), (tmp_path / "packed", "of-packed")):
        recipe = make_recipe({"model": {"name": str(source)}, "data": data, "solver": {"name": "magnitude"}})
        prune(recipe, tmp_path / output, Silent())
    assert shards(tmp_path / "of-packed") == shards(tmp_path / "of-dense")
    assert not (tmp_path / "of-packed" / PACKED_INDEX).exists()
    config = (tmp_path / "of-packed" / "config.json").read_bytes()
    assert config == (zoo(family) / "config.json").read_bytes()


def test_evaluating_one_gives_the_scores_of_the_dense_one(zoo: Zoo, packed: Path, tmp_path: Path) -> None:
    save_file({"input_ids": token_rows(6)}, tmp_path / "text.safetensors")
    task = f"text={tmp_path / 'text.safetensors'}"

    def scores(source: Path) -> Any:
        return evaluate_checkpoint(str(source), [task], Silent(), seqlen=32)["tasks"]

    assert scores(packed) == scores(zoo("llama"))


def test_damage_is_found_where_it_is_read(packed: Path) -> None:
    (path,) = packed.glob("*.safetensors")
    whole = bytearray(path.read_bytes())
    whole[-9] ^= 16
    path.write_bytes(whole)
    checkpoint = open_checkpoint(packed)
    with pytest.raises(InputError, match=f"{path.name} is damaged at tensor"):
        checkpoint.read(checkpoint.headers)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="is truncated"):
        open_checkpoint(packed)


def test_what_cannot_be_pruned_and_what_lies_elsewhere_is_refused(zoo: Zoo, packed: Path, tmp_path: Path) -> None:
    (packed / "generation_config.json").unlink()
    (packed / "generation_config.json").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is a link to"):
        open_checkpoint(packed)
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    path = zoo("llama") / "model.safetensors"
    save_file({name: x.to(torch.float8_e4m3fn) for name, x in load_file(path).items()}, narrow / path.name)
    (narrow / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="F8_E4M3"):
        pack(narrow, tmp_path / "small", Silent())


def test_it_is_found_by_its_index(zoo: Zoo, packed: Path) -> None:
    assert PACKED.found(packed) and not PACKED.found(zoo("llama"))
