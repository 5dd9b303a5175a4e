"""Batch norms after pruning: what leaves them has the mean and the variance it had before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obsprune.engine.norms import Renorm, batch_norms
from obsprune.models.walk import Walk
from obsprune.ranks import ALONE


class Block(nn.Module):
    """Two convolutions, a norm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 1)
        self.one, self.two = nn.BatchNorm2d(6), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.two(self.second(self.one(self.first(x)).relu())))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.block(x))


def network(*, folded: bool) -> Network:
    """A trained one has its data's statistics; a folded one mean 0 and variance 1."""
    torch.manual_seed(0)
    made = Network()
    for norm in (made.block.one, made.block.two):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    if not folded:
        made.train()
        with torch.no_grad():
            for batch in batches():
                for _ in range(30):
                    made(**batch)
    return made.eval()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(count, 3, 8, 8, generator=generator)} for count in (5, 2)]


def leaving(made: Network, norm: nn.Module) -> Tensor:
    """What leaves a norm over all batches [T, channels], float64."""
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda m, args, out: seen.append(out.movedim(1, -1).flatten(0, -2).double()))
    with torch.no_grad():
        for batch in batches():
            made(**batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("folded", [True, False])
def test_mean_and_variance_behind_every_norm_are_the_dense_ones(folded: bool) -> None:
    made = network(folded=folded)
    norms = batch_norms(made.block)
    dense = [leaving(made, norm) for norm in norms]
    with Walk(made, [made.block], batches()) as walk:
        for stop in walk:
            renorm = Renorm.of(stop, stop.keys, ALONE)
            for conv in (made.block.first, made.block.second):
                conv.weight.data[:, : conv.in_channels // 2] = 0
            broken = [leaving(made, norm) for norm in norms]
            renorm.apply(stop)
            stop.hand_on()
    for norm, before, between in zip(norms, dense, broken, strict=True):
        after = leaving(made, norm)
        torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after.var(0), before.var(0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(between.mean(0), before.mean(0), rtol=1e-2)
        assert not torch.allclose(between.var(0), before.var(0), rtol=1e-2)


def test_nothing_moves_where_nothing_was_pruned_and_dead_channels_stay() -> None:
    made = network(folded=False)
    made.block.first.weight.data[2] = 0  # a channel that never varies
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with Walk(made, [made.block], batches()) as walk:
        for stop in walk:
            Renorm.of(stop, stop.keys, ALONE).apply(stop)
            stop.hand_on()
    after: dict[str, Any] = made.state_dict()
    assert all(torch.allclose(after[name], tensor, rtol=1e-6, atol=1e-7) for name, tensor in state.items())
