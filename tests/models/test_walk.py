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
