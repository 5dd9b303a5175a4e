"""Where waiting activations live changes no bit, and what is put away is really away."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from anonymous import MB, now
from torch import Tensor, UntypedStorage
from zoo import ZOO, Zoo, logits, reference, token_batches

from obsprune.errors import OutputError
from obsprune.models import activations
from obsprune.models.activations import (
    Activations,
    Arrival,
    InFiles,
    InHost,
    OnDevice,
    address,
    chooser,
    movable,
    trim_heap,
)
from obsprune.models.load import load
from obsprune.models.walk import in_turn

CPU = torch.device("cpu")
Make = Callable[[Path], Activations]
PLACES: dict[str, Make] = {
    "mapped": lambda folder: InFiles(CPU, folder, direct=True),
    "fetched": lambda folder: InFiles(CPU, folder, direct=False),  # as for a model on another device
}
places = pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
LARGE = activations.LEAST // 4


def away(x: Tensor) -> bool:
    return x.untyped_storage().filename is not None


@places
@pytest.mark.parametrize("family", ZOO)
def test_a_walk_gives_the_same_bits(
    zoo: Zoo, family: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "LEAST", 1)
    model, batches, plain = load(str(zoo(family))), token_batches(3), reference(zoo(family))
    found: dict[int, Tensor] = {}
    waiting: list[bool] = []
    entering: list[bool] = []
    walked = replace(model, activations=lambda needed: make(tmp_path))
    with walked.walk(batches, lambda key, out: found.update({key: out.logits})) as walk:
        for stop in walk:
            for key in stop.keys:
                waiting += map(away, movable(walk.calls[key]))
                entering += map(away, movable(stop.call(key)))
            with model.blocks[stop.index].loaded(CPU):
                for key in stop.keys:
                    stop.run(key)
                stop.hand_on()
    assert waiting and all(waiting)
    assert entering and all(entering) == make(tmp_path).direct == any(entering)  # type: ignore[attr-defined]
    assert not any(away(batch["input_ids"]) for batch in batches)
    assert not list(tmp_path.iterdir())
    for key, batch in enumerate(batches):
        assert torch.equal(found[key], logits(plain, batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_embeddings_that_the_model_holds_on_to_are_away(
    zoo: Zoo, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "LEAST", 1)
    model, embedded = load(str(zoo(family))).keeping("disk", tmp_path), list[Tensor]()
    model.network.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(out))
    with model.walk(token_batches(2)) as walk:
        next(iter(walk))
        assert len(embedded) == 2 and all(map(away, embedded))


@places
def test_tensors_stay_what_they_are(make: Make, tmp_path: Path) -> None:
    base = torch.randn(4, LARGE)
    row, turned, spread = base[1], base.T, torch.randn(LARGE).expand(3, LARGE)
    before = [x.clone() for x in (base, row, turned, spread)]
    shape = [(x.shape, x.stride(), x.storage_offset()) for x in (base, row, turned, spread)]
    place = make(tmp_path)
    place.put([base, row, turned, spread, base])
    assert all(map(away, (base, row, turned, spread)))
    assert shape == [(x.shape, x.stride(), x.storage_offset()) for x in (base, row, turned, spread)]
    assert all(torch.equal(x, y) for x, y in zip((base, row, turned, spread), before, strict=True))
    row.zero_()
    assert not base[1].any() and not turned[:, 1].any()


def test_what_is_changed_while_it_is_awake_stays_changed(tmp_path: Path) -> None:
    place, changed, same = InFiles(CPU, tmp_path, direct=False), torch.zeros(LARGE), torch.ones(LARGE)
    place.put([changed, same])
    kept = same.data_ptr()
    with place.awake([changed, same]):
        assert not away(changed) and not away(same)
        changed += 1
    assert away(changed) and torch.equal(changed, same)
    assert same.data_ptr() == kept


def test_what_is_read_is_a_copy_where_it_is_not_usable_as_it_lies(tmp_path: Path) -> None:
    x = torch.randn(LARGE)
    for place in (InFiles(CPU, tmp_path, direct=True), InFiles(CPU, tmp_path, direct=False)):
        place.put([x])
        (read,) = place.read([x])
        assert torch.equal(read, x) and away(read) == place.direct == (read is x)


def test_parameters_gradients_and_small_tensors_are_left_alone() -> None:
    x = torch.randn(LARGE)
    left = [torch.nn.Parameter(x.clone(), requires_grad=False), x.clone().requires_grad_(), x[:1].clone(), "text", None]
    assert movable([x, *left]) == [x]
    assert movable((x.clone().requires_grad_() * 2, x.to("meta"), x.to_sparse())) == []


def test_a_file_ends_with_its_tensor(tmp_path: Path) -> None:
    def mapped() -> int:
        return sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    x = torch.randn(LARGE)
    InFiles(CPU, tmp_path, direct=True).put([x])
    assert mapped() == 1 and not list(tmp_path.iterdir())
    del x
    gc.collect()
    assert mapped() == 0


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    x = torch.randn(LARGE)
    with pytest.raises(OutputError, match=r"activations in .*: .*No space left.*repeat the command"):
        InFiles(CPU, tmp_path, direct=True).put([x])
    assert not away(x)


def test_what_was_freed_is_given_back() -> None:
    trim_heap()
    before = now()
    pieces = [torch.ones(2**18) for _ in range(64)]
    last = torch.ones(2**10)  # on top of the heap
    assert now() >= before + 60 * MB
    del pieces
    trim_heap()
    assert now() < before + 8 * MB and last.all()


@pytest.mark.parametrize(("free", "kind"), [(100, OnDevice), (99, InFiles)])
def test_auto_takes_half_of_what_is_free(
    free: int, kind: type[Activations], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "free_bytes", lambda device: free)
    assert type(chooser("auto", CPU, tmp_path)(50)) is kind
    assert type(chooser("disk", CPU, tmp_path)(50)) is InFiles
    assert type(chooser("host", CPU, tmp_path)(50)) is type(chooser("device", CPU, tmp_path)(50)) is OnDevice


def test_the_choice_is_made_by_what_the_first_batch_brings(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "LEAST", 2**10)
    model, asked, batches = load(str(zoo("llama"))), list[int](), token_batches(3)

    def choose(needed: int) -> Activations:
        asked.append(needed)
        return OnDevice()

    with replace(model, activations=choose).walk(batches) as walk:
        next(iter(walk))
        assert asked == [int(2.5 * 3 * sum(x.nbytes for x in movable(walk.calls[0])))]
    with replace(model, activations=choose).walk(batches, record=True) as walk:
        next(iter(walk))
    assert len(asked) == 1  # what autograd follows stays where it is


class Fetching:
    """An InHost whose copies are made at once, and noted, where there is no GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent, self.waited = list[int](), list[int]()
        self.place = InHost(torch.device("cuda"))

        def send(storage: UntypedStorage) -> Arrival:
            self.sent.append(storage.data_ptr())
            there = torch.empty(0, dtype=torch.uint8).set_(storage.clone())
            return Arrival(there, cast("torch.cuda.Event", storage.data_ptr()))

        def fetch(self: Activations, storage: UntypedStorage) -> UntypedStorage:
            return storage.clone()

        monkeypatch.setattr(self.place, "_sent", send)
        monkeypatch.setattr(activations._Elsewhere, "_fetched", fetch)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_event=self.waited.append))


def test_what_is_expected_comes_once_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fetching, x, y = Fetching(monkeypatch), torch.randn(LARGE), torch.randn(LARGE)
    place, where = fetching.place, x.data_ptr()
    place.expect([x, x.view(2, -1)])
    assert fetching.sent == [where] and not fetching.waited
    for read in place.read([x, y]):
        assert read is not x and read is not y
    assert torch.equal(place.read(x), x) and fetching.waited == [where]  # the second time it is fetched as ever
    place.expect([x])
    place.expect([y])
    place.read([x])
    assert fetching.waited == [where]  # no longer expected
    place.expect([])
    assert not place.coming


def test_the_batch_that_is_named_is_expected(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "LEAST", 1)
    model, fetching = load(str(zoo("llama"))), Fetching(monkeypatch)
    with replace(model, activations=lambda needed: fetching.place).walk(token_batches(3)) as walk:
        for stop in walk:
            entering = {key: sorted({address(x) for x in movable(walk.calls[key])}) for key in stop.keys}
            with model.blocks[stop.index].loaded(CPU):
                if stop.index:
                    stop.run(0, then=1)
                    assert fetching.place.coming
                    break
                for key, then in in_turn([2, 0, 1]):
                    fetching.sent.clear()
                    output = stop.run(key, then=then)
                    assert sorted(fetching.sent) == (entering[then] if then is not None else [])
                    stop.leave(key, output)
    assert not fetching.place.coming  # a walk that ends waits for nothing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("where", ["host", "disk"])
def test_on_a_gpu_they_are_away_too(zoo: Zoo, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "LEAST", 1)
    model = load(str(zoo("llama")), device="cuda")
    batches = [{name: x.to("cuda") for name, x in batch.items()} for batch in token_batches(3)]
    found: dict[str, list[Tensor]] = {"device": [], where: []}
    for place, outputs in found.items():
        walk = model.keeping(place, tmp_path).walk(
            batches, lambda key, out, outputs=outputs: outputs.append(out.logits)
        )
        with walk:
            for stop in walk:
                waiting = {x.device.type for key in stop.keys for x in movable(walk.calls[key])}
                assert waiting == ({"cuda"} if place == "device" else {"cpu"})
                with model.blocks[stop.index].loaded(model.device):
                    stop.hand_on()
    assert all(map(torch.equal, found["device"], found[where]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_what_is_expected_comes_while_it_computes() -> None:
    """Whatever is under way, and however memory is used again: the copies are what was put away."""
    device = torch.device("cuda")
    place, work = InHost(device), torch.randn(4096, 4096, device=device)
    batches = [torch.full((2**22,), float(key), device=device) for key in range(8)]
    place.put(batches)
    assert {x.device.type for x in batches} == {"cpu"}
    place.expect(batches[:1])
    for key, x in enumerate(batches):
        read = place.read(x)
        place.expect(batches[key + 1 : key + 2])
        for _ in range(20):
            work = (work @ work).clamp_(-1, 1)
        scratch = [torch.empty_like(read).fill_(-1) for _ in range(3)]  # memory just freed
        assert read.device.type == "cuda" and bool((read == key).all())
        del read, scratch
    place.expect(batches)
    place.expect([])  # given up while they are on their way
    assert bool((torch.zeros(2**22, device=device) == 0).all())


@pytest.mark.parametrize(
    ("limit", "left"), [("max", []), ("1000", [1000 - 600 + 100]), ("500", [0]), ("what?", [])], ids=str
)
def test_the_limit_of_a_container(tmp_path: Path, limit: str, left: list[int]) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 100\nactive_file 7\n")
    assert activations._container_bytes(tmp_path) == left
    assert activations._container_bytes(tmp_path / "nowhere") == []


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations.psutil, "virtual_memory", lambda: SimpleNamespace(available=800))
    monkeypatch.setattr(activations, "_container_bytes", lambda: [600])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert activations.free_bytes(torch.device("cpu")) == 150
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert activations.free_bytes(torch.device("cpu")) == 600
