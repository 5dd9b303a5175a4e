"""Masks in a file: as many bits as weights, and the same bits back; what is damaged is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from obsprune.errors import InputError
from obsprune.models import masks as module
from obsprune.models.checkpoint import Checkpoint, write_index
from obsprune.models.files import SAFETENSORS
from obsprune.models.masks import ENTRY, MaskFile, write_masked, write_masks
from obsprune.progress import Silent

SHAPES = {"a": (3, 5), "b": (4, 2, 3), "c": (8, 8), "d": (1, 1)}


def checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16, zeros: bool = True) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    held: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        whole = torch.randn(shape, generator=generator).to(dtype)
        held[name] = whole.masked_fill(torch.rand(shape, generator=generator) < 0.5, 0) if zeros else whole
    held["norm"], held["ids"] = torch.tensor([0.0, -0.0, torch.nan, 1.0]), torch.arange(4)
    save_file(held, folder / "model.safetensors")
    return Checkpoint.open(folder)


def written(folder: Path) -> tuple[Checkpoint, Path]:
    source = checkpoint(folder / "source")
    write_masks(folder / "masks.safetensors", source, list(SHAPES), "2:4", Silent())
    return source, folder / "masks.safetensors"


def test_the_masks_are_those_of_the_weights_in_a_bit_each(tmp_path: Path) -> None:
    source, path = written(tmp_path)
    found = MaskFile.open(path)
    assert found.pattern == "2:4" and found.shapes == SHAPES
    for name, tensor in source.read(SHAPES).items():
        assert torch.equal(found.keep(name), tensor != 0)
    by_hand = {name: np.packbits((x.flatten() != 0).numpy()) for name, x in source.read(SHAPES).items()}
    stored = load_file(path)  # another reader
    assert stored.keys() == SHAPES.keys()
    assert all((stored[name].numpy() == bits).all() for name, bits in by_hand.items())
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == [ENTRY]
        assert json.loads(file.metadata()[ENTRY])["version"] == 1


def test_zeros_are_counted_and_the_same_masks_are_the_same_bytes(tmp_path: Path) -> None:
    source, path = written(tmp_path)
    again = tmp_path / "again.safetensors"
    zeros = write_masks(again, source, list(SHAPES), "2:4", Silent())
    assert zeros == sum(int((x == 0).sum()) for x in source.read(SHAPES).values()) > 0
    assert again.read_bytes() == path.read_bytes()


def test_it_has_the_size_of_its_bits(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    save_file({"w": torch.randn(1000, 1000).bfloat16()}, tmp_path / "large" / "model.safetensors")
    path = tmp_path / "masks.safetensors"
    write_masks(path, Checkpoint.open(tmp_path / "large"), ["w"], None, Silent())
    assert 125_000 < path.stat().st_size < 125_300
    assert MaskFile.open(path).pattern is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("limit", [1, 60, 2**30])
def test_another_checkpoint_is_zero_there_and_has_its_own_bits_elsewhere(
    tmp_path: Path, dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", limit)
    masks = MaskFile.open(written(tmp_path)[1])
    other, output = checkpoint(tmp_path / "other", dtype, zeros=False), tmp_path / "output"
    before = (tmp_path / "other" / "model.safetensors").read_bytes()
    output.mkdir()
    removed = write_masked(other, masks, output, Silent())
    write_index(output)
    found, dense = Checkpoint.open(output), other.read(other.headers)
    assert found.headers.keys() == other.headers.keys()
    for name, tensor in found.read(found.headers).items():
        keep = masks.keep(name) if name in SHAPES else torch.ones(tensor.shape, dtype=torch.bool)
        assert tensor.dtype == dense[name].dtype
        assert (tensor[~keep] == 0).all() and not tensor[~keep].signbit().any()
        assert torch.equal(bits(tensor)[keep], bits(dense[name])[keep])
    assert removed == sum(int((~masks.keep(name)).sum()) for name in SHAPES)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == before
    shards = len(list(output.glob("model-*.safetensors")))
    assert shards == 1 if limit == 2**30 else shards == len(dense) if limit == 1 else 1 < shards < len(dense)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def test_differences_of_architecture_are_told(tmp_path: Path) -> None:
    masks = MaskFile.open(written(tmp_path)[1])
    (tmp_path / "other").mkdir()
    save_file({"a": torch.ones(5, 3), "b": torch.ones(4, 2, 3)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(InputError) as refused:
        masks.require_fit(Checkpoint.open(tmp_path / "other"))
    for phrase in ("a is 5 x 3 there and 3 x 5 in the masks", "c is missing there and 8 x 8", "d is missing"):
        assert phrase in str(refused.value)
    assert "b is" not in str(refused.value)


def stored(path: Path, facts: Any, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, metadata={ENTRY: json.dumps(facts)})
    return path


FACTS = {"version": 1, "pattern": None, "shapes": {"a": [3, 5]}}
TWO = torch.zeros(2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("facts", "tensors", "says"),
    [
        (FACTS | {"version": 2}, {"a": TWO}, "version 2 of the format, and this obsprune reads 1"),
        ([], {"a": TWO}, "is damaged"),
        ({"version": 1}, {"a": TWO}, "is damaged"),
        (FACTS | {"shapes": {"a": ["x", 5]}}, {"a": TWO}, "is damaged"),
        (FACTS | {"shapes": {"a": [-3, -5]}}, {"b": TWO}, "does not hold the masks"),
        (FACTS | {"shapes": {"a": [3, 6]}}, {"a": TWO}, "does not hold the masks"),
        (FACTS | {"shapes": 5}, {"a": TWO}, "is damaged"),
        (FACTS, {"b": TWO}, "does not hold the masks"),
        (FACTS, {"a": TWO.to(torch.int8)}, "does not hold the masks"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(tmp_path: Path, facts: Any, tensors: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        MaskFile.open(stored(tmp_path / "masks.safetensors", facts, tensors))


def test_other_files_are_no_masks(tmp_path: Path) -> None:
    source, path = written(tmp_path)
    with pytest.raises(InputError, match="there is no file"):
        MaskFile.open(tmp_path / "none")
    with pytest.raises(InputError, match="holds no masks"):
        MaskFile.open(source.paths()[0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        MaskFile.open(path)


def test_tensors_begin_where_processors_like_it(tmp_path: Path) -> None:
    _, path = written(tmp_path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0 and SAFETENSORS.headers(path).keys() == SHAPES.keys()
