"""The walk is the model: bit-equal on every family, and nothing is left behind however it ends."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Zoo, logits, reference, token_batches

from obsprune.errors import WalkMismatch
from obsprune.models.load import Model, load
from obsprune.models.walk import Walk


def walked(model: Model, batches: list[dict[str, Tensor]], observe: bool) -> list[Tensor]:
    """Logits of every batch by the walk; with `observe`, each block is run once more before its output is handed on."""
    found: dict[int, Tensor] = {}
    modules = [block.module for block in model.blocks]
    with Walk(model.network, modules, batches, lambda key, out: found.update({key: out.logits})) as walk:
        for stop in walk:
            with model.blocks[stop.index].loaded(model.device):
                if observe:
                    for key in stop.keys:
                        stop.run(key)
                stop.hand_on()
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("family", ZOO)
def test_bit_equal_to_the_model(zoo: Zoo, family: str, observe: bool) -> None:
    directory, batches = zoo(family), token_batches(3)
    plain = reference(directory)
    for ours, batch in zip(walked(load(str(directory)), batches, observe), batches, strict=True):
        assert torch.equal(ours, logits(plain, batch))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom"])
def test_bit_equal_in_bfloat16(zoo: Zoo, family: str) -> None:
    """Buffers have dtypes of their own: rotary frequencies stay float32, Gemma's embedding scale is rounded."""
    directory, batches = zoo(family, torch.bfloat16), token_batches(2)
    plain = reference(directory)
    for ours, batch in zip(walked(load(str(directory)), batches, True), batches, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, logits(plain, batch))


class Toy(nn.Module):
    """Linear blocks run in the order that the batch's first number chooses."""

    def __init__(self, orders: list[list[int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.orders = orders

    def forward(self, x: Tensor, order: int) -> Any:
        for index in self.orders[order]:
            x = self.layers[index](x)
        return x


def toy_walk(model: Toy, orders: list[int], **options: Any) -> Walk:
    batches: list[Any] = [{"x": torch.ones(1, 4), "order": order} for order in orders]
    return Walk(model, list(model.layers), batches, **options)


@pytest.mark.parametrize(
    ("orders", "says"),
    [
        ([[0, 1, 1, 2]], "twice"),
        ([[0, 1, 2], [1, 0, 2]], "different ways"),
        ([[0, 1, 2], [0, 2]], "different ways"),
        ([[0, 2]], "never run"),
    ],
)
def test_unsupported_ways(orders: list[list[int]], says: str) -> None:
    with pytest.raises(WalkMismatch, match=says), toy_walk(Toy(orders), list(range(len(orders)))) as walk:
        for stop in walk:
            stop.hand_on()


def test_the_last_stop_is_the_last_in_time() -> None:
    with toy_walk(Toy([[2, 0, 1]]), [0]) as walk:
        seen = []
        for stop in walk:
            seen.append((stop.index, stop.last))
            stop.hand_on()
    assert seen == [(2, False), (0, False), (1, True)]


def left_behind(model: Toy, walk: Walk) -> tuple[int, int]:
    """(blocks still patched, greenlets still asleep)."""
    patched = sum("forward" in vars(layer) for layer in model.layers)
    return patched, sum(1 for driver in walk.drivers.values() if driver and not driver.dead)


def test_nothing_is_left_after_an_early_end() -> None:
    model = Toy([[0, 1, 2]])
    with toy_walk(model, [0, 0]) as walk:
        next(iter(walk))
    assert left_behind(model, walk) == (0, 0)


def test_nothing_is_left_after_an_error_in_the_engine() -> None:
    model = Toy([[0, 1, 2]])
    walk = toy_walk(model, [0, 0])
    with pytest.raises(KeyError), walk:
        for stop in walk:
            stop.hand_on()
            raise KeyError
    assert left_behind(model, walk) == (0, 0)


def test_an_error_inside_the_model_comes_out_and_nothing_is_left() -> None:
    model = Toy([[0, 1, 2]])
    model.layers[1] = nn.Linear(5, 4)
    walk = toy_walk(model, [0, 0])
    with pytest.raises(RuntimeError, match="shapes"), walk:
        for stop in walk:
            stop.hand_on()
    assert left_behind(model, walk) == (0, 0)


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_is_as_it_was(enabled: bool) -> None:
    class Leaky(Toy):
        def forward(self, x: Tensor, order: int) -> Any:
            torch.set_grad_enabled(not torch.is_grad_enabled())
            return super().forward(x, order)

    outputs: list[Tensor] = []
    with torch.set_grad_enabled(enabled):
        with toy_walk(Leaky([[0, 1, 2]]), [0], finish=lambda _, out: outputs.append(out)) as walk:
            for stop in walk:
                assert torch.is_grad_enabled() is enabled
                stop.hand_on()
        assert torch.is_grad_enabled() is enabled
    assert len(outputs) == 1


def test_grad_mode_is_as_it_was_after_an_error_in_the_engine() -> None:
    class Guarded(Toy):
        @torch.no_grad()
        def forward(self, x: Tensor, order: int) -> Any:
            return super().forward(x, order)

    with pytest.raises(KeyError), toy_walk(Guarded([[0, 1, 2]]), [0, 0]) as walk:
        for _ in walk:
            raise KeyError
    assert torch.is_grad_enabled()


def test_all_sleepers_end_even_if_the_cleanup_of_one_raises() -> None:
    class Untidy(Toy):
        def forward(self, x: Tensor, order: int) -> Any:
            try:
                return super().forward(x, order)
            finally:
                if order == 0:
                    raise OSError("cleanup")

    model = Untidy([[0, 1, 2], [0, 1, 2]])
    walk = toy_walk(model, [0, 1, 1])
    with pytest.raises(OSError, match="cleanup"), walk:
        next(iter(walk))
    assert left_behind(model, walk) == (0, 0)


SHALLOW = """
import ctypes, torch
from torch import nn
from obsprune.models.walk import Walk
class Shallow(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.frames = 0
    def forward(self, x):
        found = (ctypes.c_void_p * 4096)()
        self.frames = ctypes.CDLL(None).backtrace(found, 4096)
        self.block(x)
        torch.ones(2, 3) @ torch.ones(2, 3)
model = Shallow()
for _ in range(20):
    try:
        with Walk(model, [model.block], [{"x": torch.ones(1, 4)}]) as walk:
            for stop in walk:
                stop.hand_on()
    except RuntimeError as error:
        assert "shapes" in str(error)
    else:
        raise SystemExit("no error")
print(model.frames)
"""


def test_a_torch_error_in_a_shallow_model_does_not_crash_python() -> None:
    """Torch walks up 65 C frames when it raises; without the floor it leaves the greenlet's stack and crashes."""
    done = subprocess.run([sys.executable, "-c", SHALLOW], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert int(done.stdout) > 65
