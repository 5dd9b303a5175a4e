"""Weights that are read before they are needed are the same, and never more than one block of them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from zoo import Zoo, logits, reference, token_batches

from obsprune.errors import InputError
from obsprune.models.checkpoint import FileCheckpoint
from obsprune.models.load import Model, load, read_ahead


@pytest.fixture
def model(zoo: Zoo) -> Model:
    found = load(str(zoo("llama")))
    read_ahead(found.blocks, pin=False)
    return found


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The thread of each reading."""
    names, read = [], FileCheckpoint.read

    def noted(self: FileCheckpoint, keys: list[str]) -> dict[str, torch.Tensor]:
        names.append(threading.current_thread().name)
        return read(self, keys)

    monkeypatch.setattr(FileCheckpoint, "read", noted)
    return names


def test_a_walk_reads_ahead_and_gives_the_same(zoo: Zoo, model: Model, readers: list[str]) -> None:
    batches, found = token_batches(2), {}
    with model.walk(batches, lambda key, out: found.update({key: out.logits})) as walk:
        for stop in walk:
            with model.blocks[stop.index].loaded(model.device):
                stop.hand_on()
    ahead = [name.startswith("read-ahead") for name in readers]
    assert ahead == [False] + [True] * (len(model.blocks) - 1)
    plain = reference(zoo("llama"))
    for key, batch in enumerate(batches):
        assert torch.equal(found[key], logits(plain, batch))


def test_out_of_turn_nothing_is_read_ahead(model: Model, readers: list[str]) -> None:
    for block in reversed(model.blocks):
        with block.loaded(model.device):
            pass
    assert readers == [threading.main_thread().name] * len(model.blocks)


def test_a_second_walk_begins_again(model: Model, readers: list[str]) -> None:
    for _ in range(2):
        with model.loaded():
            pass
    assert [name.startswith("read-ahead") for name in readers] == 2 * ([False] + [True] * (len(model.blocks) - 1))


def test_damage_is_told_at_its_block(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read, last = FileCheckpoint.read, model.blocks[-1]

    def damaged(self: FileCheckpoint, keys: list[str]) -> dict[str, torch.Tensor]:
        if list(keys) == last.keys:
            raise InputError("cannot be read")
        return read(self, keys)

    monkeypatch.setattr(FileCheckpoint, "read", damaged)
    for block in model.blocks[:-1]:
        with block.loaded(model.device):
            pass
    with pytest.raises(InputError, match="cannot be read"), last.loaded(model.device):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(zoo: Zoo, tmp_path: Path) -> None:
    model, batches, found = load(str(zoo("llama")), device="cuda"), token_batches(2), {}
    batches = [{name: x.to(model.device) for name, x in batch.items()} for batch in batches]
    assert model.blocks[0].ahead is not None and model.blocks[0].ahead.pin
    with model.walk(batches, lambda key, out: found.update({key: out.logits})) as walk:
        for stop in walk:
            with model.blocks[stop.index].loaded(model.device):
                stop.hand_on()
    with model.loaded(), torch.no_grad():
        for key, batch in enumerate(batches):
            assert torch.equal(found[key], model.network(**batch).logits)
