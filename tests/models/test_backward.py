"""The reverse walk is autograd, bit for bit, and refuses what it cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import SIDE_CHANNEL, ZOO, Zoo, reference, token_batches

from obsprune.errors import WalkMismatch
from obsprune.models.backward import backward_of, reverse_walk
from obsprune.models.load import Model, load
from obsprune.models.matrices import differentiated
from obsprune.models.walk import Walk


def loss(key: int, output: Any) -> Tensor:
    """Something that depends on every logit, and differently in every batch."""
    return (output.logits.float() * (key + 1)).tanh().square().sum()


def by_reverse_walk(model: Model, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """{matrix: gradient in the layer's own layout}, the blocks loaded only for their visits."""
    found: dict[str, Tensor] = {}

    @contextmanager
    def backward_at(index: int) -> Iterator[Callable[[Callable[[], None]], None]]:
        block = model.blocks[index]
        with block.loaded(model.device), differentiated([matrix.tensor for matrix in block.matrices]):
            yield lambda run: run()
            for matrix in block.matrices:
                found[matrix.parameter] = matrix.module.get_parameter("weight").grad.clone()

    modules = [block.module for block in model.blocks]
    walk = Walk(model.network, modules, batches, backward_of(loss), record=True)
    reverse_walk(walk, lambda index: model.blocks[index].loaded(model.device), backward_at)
    return found


@pytest.mark.parametrize("family", ZOO)
def test_bit_equal_to_autograd(zoo: Zoo, family: str) -> None:
    model, batches = load(str(zoo(family))), token_batches(3)
    ours = by_reverse_walk(model, batches)
    plain = reference(zoo(family)).requires_grad_(False)
    for name in ours:
        plain.get_parameter(name).requires_grad_(True)
    for key, batch in enumerate(batches):
        loss(key, plain(**batch, use_cache=False)).backward()
    assert ours.keys() == {f"{name}.weight" for name in ZOO[family].matrices}
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, plain.get_parameter(name).grad), name


def test_shared_keys_and_values_are_refused(zoo: Zoo) -> None:
    """Gemma 3n's later layers read keys and values of earlier ones from an object that no gradient passes through."""
    model = load(str(zoo.make("gemma3n-shared", SIDE_CHANNEL)))
    with pytest.raises(WalkMismatch, match=r"Gemma3nForCausalLM.*only --iters 1"):
        by_reverse_walk(model, token_batches(1))


class Glue(nn.Module):
    """Two blocks that return tuples, with work between them that has a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Pair(), Pair()

    def forward(self, x: Tensor) -> Any:
        x, y = self.first(x, x)
        x, y = self.second(x * y.mean(), y.tanh())
        return x + y


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) + y, self.linear(y).sin()


def test_gradients_pass_what_lies_between_the_blocks() -> None:
    model, batches = Glue(), [{"x": torch.randn(5, 4)} for _ in range(2)]
    for batch in batches:
        model(**batch).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    walk = Walk(
        model, [model.first, model.second], batches, backward_of(lambda _, out: out.square().sum()), record=True
    )
    reverse_walk(walk, lambda index: nullcontext(), lambda index: nullcontext(lambda run: run()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_grad_mode_is_as_before() -> None:
    model = Glue().requires_grad_(False)
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            walk = Walk(model, [model.first, model.second], [{"x": torch.ones(1, 4)}], record=True)
            with walk:
                for stop in walk:
                    assert torch.is_grad_enabled() is mode
                    stop.hand_on()
            assert torch.is_grad_enabled() is mode
