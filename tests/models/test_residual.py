"""Which layers write to the residual stream, and where: found in every family without knowing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Zoo, token_batches

from obsprune.models.load import Model, load
from obsprune.models.residual import Junction, find_junctions, watched
from obsprune.models.walk import Walk

WRITERS = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"}, "mistral": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen2": {"self_attn.o_proj", "mlp.down_proj"}, "qwen3": {"self_attn.o_proj", "mlp.down_proj"},
    "llama-tied": {"self_attn.o_proj", "mlp.down_proj"}, "olmo2": set(), "gemma2": set(), "gemma3": set(),
    "phi": {"self_attn.dense", "mlp.fc2"}, "opt": {"self_attn.out_proj", "fc2"}, "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},
    "bloom": {"self_attention.dense", "mlp.dense_4h_to_h"},
    "falcon-parallel": {"self_attention.dense", "mlp.dense_4h_to_h"},
    "falcon-new": {"self_attention.dense", "mlp.dense_4h_to_h"},
}  # fmt: skip
"""olmo2 and gemma put a norm between the layer and the stream: what they write is no multiple of the layer's output."""


def at_first_block(model: Model, batch: dict[str, Tensor]) -> tuple[Any, dict[Any, Junction], Any]:
    """(block, its junctions, the call of the batch)."""
    block = model.blocks[0]
    with Walk(model.network, [block.module for block in model.blocks], [batch]) as walk:
        stop = next(iter(walk))
        with block.loaded(model.device):
            call = stop.call(0)
            return block, find_junctions(block.module, block.matrices, call), call


@pytest.mark.parametrize("family", ZOO)
def test_the_writers_of_every_family(zoo: Zoo, family: str) -> None:
    block, found, _ = at_first_block(load(str(zoo(family))), token_batches(1)[0])
    assert {matrix.name.removeprefix(f"{block.name}.") for matrix in found} == WRITERS[family]
    for junction in found.values():
        torch.testing.assert_close(junction.scale_R, torch.ones_like(junction.scale_R), rtol=1e-4, atol=1e-4)


def test_bfloat16_blocks_are_tested_in_float32_and_left_as_they_were(zoo: Zoo) -> None:
    model = load(str(zoo("llama", torch.bfloat16)))
    block, found, _ = at_first_block(model, token_batches(1)[0])
    assert {matrix.name.removeprefix(f"{block.name}.") for matrix in found} == WRITERS["llama"]
    assert all(p.dtype == torch.bfloat16 for p in block.module.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-parallel"])
def test_the_stream_before_the_layer(zoo: Zoo, family: str) -> None:
    """What is watched is T − o: it does not depend on the layer's own weight."""
    model = load(str(zoo(family)))
    block, found, (args, kwargs) = at_first_block(model, token_batches(1)[0])
    streams: list[dict[Any, Tensor]] = []
    with block.loaded(model.device), torch.no_grad():
        for matrix in found:
            for factor in (1.0, 0.3):
                seen: dict[Any, Tensor] = {}
                matrix.write(factor * matrix.read())
                with watched(block.module, {matrix: found[matrix]}, lambda m, h, seen=seen: seen.update({m: h})) as out:
                    out(block.module.forward(*args, **kwargs))
                streams.append(seen)
            one, other = streams[-2][matrix], streams[-1][matrix]
            assert one.shape == (48, matrix.shape[0])
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class Scaled(nn.Module):
    """Writes a multiple of one layer to the stream; the other's output is never added to anything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.writer, self.reader = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        h = h + 0.22 * self.writer(self.reader(h).relu())
        return torch.as_tensor(self.norm(h))


def test_a_scaled_writer() -> None:
    from obsprune.models.matrices import LinearMatrix

    block = Scaled()
    matrices = [LinearMatrix(name, getattr(block, name), torch.float32) for name in ("writer", "reader")]
    found = find_junctions(block, list(matrices), ((torch.randn(3, 5, 8),), {}))
    assert list(found) == [matrices[0]]
    junction = found[matrices[0]]
    assert junction.module is block.norm and junction.entering
    torch.testing.assert_close(junction.scale_R, torch.full((8,), 0.22), rtol=1e-4, atol=1e-5)
