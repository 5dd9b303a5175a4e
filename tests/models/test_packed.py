"""Packed files: the same tensors, the same file byte by byte, and damage that is found and named."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from obsprune.errors import InputError
from obsprune.models.checkpoint import PACKED_INDEX
from obsprune.models.packed import (
    PackedCheckpoint,
    PackedFile,
    pack_file,
    packed_config,
    packed_names,
    unpack_file,
    write_packed_index,
)
from obsprune.progress import Silent

NAME = "obsprune-00001-of-00001.safetensors"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip


def sparse(*shape: int) -> torch.Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return weight.masked_fill(weight.abs() < 0.7, 0)


def samples() -> dict[str, torch.Tensor]:
    kinds = {str(dtype): (sparse(6, 5) * 3).to(dtype) for dtype in DTYPES}
    bits = torch.tensor([0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800000, 1, 0, 0]).to(torch.int32).view(torch.float32)
    return kinds | {
        "matrix": sparse(64, 33),
        "dense": sparse(8, 8) + 9,
        "zero": torch.zeros(40, 3),
        "vector": sparse(7),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "special": bits,
        "ünïcode\n": torch.ones(3),
    }


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    save_file(samples(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A packed file of a kilobyte, one tensor compressed and one not."""
    save_file({"matrix": sparse(12, 20).half(), "vector": sparse(5)}, tmp_path / "model.safetensors")
    pack_file(tmp_path / "model.safetensors", tmp_path / NAME, Silent())
    return tmp_path / NAME


@pytest.fixture
def small(dense: Path) -> Path:
    pack_file(dense, dense.parent / NAME, Silent())
    return dense.parent / NAME


def unpacked(path: Path) -> bytes:
    target = path.parent / "again"
    unpack_file(PackedFile(path), target, Silent())
    return target.read_bytes()


def test_the_file_comes_back_byte_by_byte(dense: Path, small: Path) -> None:
    assert unpacked(small) == dense.read_bytes()


def test_it_is_a_safetensors_file_that_others_can_open(small: Path) -> None:
    found = load_file(small)
    assert found.keys() == samples().keys() and all(tensor.dtype == torch.uint8 for tensor in found.values())


def test_tensors_come_back_one_by_one(small: Path) -> None:
    file, expected = PackedFile(small), samples()
    assert [stored.name for stored in file.tensors].count("matrix") == 1
    for stored in file.tensors:
        wanted = expected[stored.name]
        if wanted.dtype in (torch.float8_e4m3fn, torch.complex64):
            with pytest.raises(InputError, match="only unpack brings back"):
                file.tensor(stored)
            continue
        found = file.tensor(stored)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        if wanted.numel():
            assert torch.equal(found.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8))


def test_the_same_file_is_packed_to_the_same_bytes(dense: Path, small: Path) -> None:
    before = small.read_bytes()
    pack_file(dense, small, Silent())
    assert small.read_bytes() == before


@pytest.mark.parametrize("header", [b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   ', b"{}"])
def test_headers_of_other_writers_come_back(tmp_path: Path, header: bytes) -> None:
    data = b"\0\0\0\0\0\0\0\x80" if b"F32" in header else b""
    whole = struct.pack("<Q", len(header)) + header + data
    (tmp_path / "model.safetensors").write_bytes(whole)
    pack_file(tmp_path / "model.safetensors", tmp_path / NAME, Silent())
    assert unpacked(tmp_path / NAME) == whole


def checkpoint(small: Path) -> Path:
    write_packed_index(small.parent, {NAME: "model.safetensors"}, {"config.json": "{}"})
    return small.parent


def outcome(directory: Path) -> bytes | str:
    """What unpacking gives: the bytes, or an error's sentence."""
    try:
        (file,) = PackedCheckpoint.open(directory).files
        return b"".join(file.read(stored).tobytes() for stored in file.tensors)
    except InputError as error:
        return str(error)


def test_a_changed_byte_never_gives_another_tensor_and_is_named(few: Path) -> None:
    directory, good = checkpoint(few), bytearray(few.read_bytes())
    right, chance = outcome(directory), random.Random(0)
    (length,) = struct.unpack("<Q", good[:8])
    places = json.loads(good[8 : 8 + length])
    owner = {
        at: name
        for name, place in places.items()
        if name != "__metadata__"
        for at in range(*(8 + length + offset for offset in place["data_offsets"]))
    }
    assert isinstance(right, bytes)
    for position in range(len(good)):
        bad = good.copy()
        bad[position] ^= chance.randrange(1, 256)
        few.write_bytes(bad)
        found = outcome(directory)
        assert found == right or (isinstance(found, str) and NAME in found), position
        if position in owner and found != right:
            assert f"tensor {owner[position]}: " in str(found)


def test_a_changed_byte_of_the_index_is_found(few: Path) -> None:
    directory = checkpoint(few)
    right, path = outcome(directory), directory / PACKED_INDEX
    good, chance = path.read_bytes(), random.Random(0)
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= chance.randrange(1, 256)
        path.write_bytes(bad)
        found = outcome(directory)
        assert found == right or (isinstance(found, str) and PACKED_INDEX in found), position


def test_what_is_cut_off_is_found(few: Path) -> None:
    directory, good = checkpoint(few), few.read_bytes()
    for length in range(0, len(good), 9):
        few.write_bytes(good[:length])
        assert NAME in str(outcome(directory))
    few.unlink()
    assert NAME in str(outcome(directory))


def test_a_tensor_under_another_name_is_not_taken(small: Path) -> None:
    """Headers of packed files are checked by the index; here there is none, and the names are exchanged."""
    whole = small.read_bytes()
    small.write_bytes(whole.replace(b"scalar", b"vector", 2).replace(b"vector", b"scalar", 1))
    with pytest.raises(InputError):
        file = PackedFile(small)
        for stored in file.tensors:
            file.read(stored)


def test_a_plain_file_is_not_taken_for_a_packed_one(dense: Path) -> None:
    with pytest.raises(InputError, match="no packed file"):
        PackedFile(dense)


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", ".safetensors", "config.json"])
def test_files_outside_the_directory_are_not_written(small: Path, name: str) -> None:
    write_packed_index(small.parent, {NAME: name}, {"config.json": "{}"})
    with pytest.raises(InputError, match="no file of a checkpoint"):
        PackedCheckpoint.open(small.parent)


def test_another_version_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsprune.models.packed.VERSION", 2)
    checkpoint(small)
    monkeypatch.undo()
    with pytest.raises(InputError, match="version 2"):
        PackedCheckpoint.open(small.parent)


def test_a_quantised_config_is_refused() -> None:
    with pytest.raises(InputError, match="quantised"):
        packed_config('{"quantization_config": {"quant_method": "gptq"}}')


def test_files_are_numbered_in_the_order_of_their_names() -> None:
    assert packed_names(["b", "a"]) == {
        "obsprune-00001-of-00002.safetensors": "a",
        "obsprune-00002-of-00002.safetensors": "b",
    }
