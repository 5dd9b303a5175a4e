"""Makes a Llama of any size with random weights, layer by layer, and token rows for it: to measure memory and time.

    python scripts/make_random_model.py OUT --gb 3 --hidden 1024 --dtype float32

writes OUT/config.json, shards of about 500 MB with their index, and OUT/tokens.safetensors (`--dataset` for prune).
The depth follows from the size. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

SHARD = 500e6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    shared = hidden // config.num_attention_heads * config.num_key_value_heads
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (shared, hidden),
        "self_attn.v_proj": (shared, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip


def tensors(config: LlamaConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """All weights in float32, one after the other: norms are ones, the rest is Gaussian with Llama's spread."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer_shapes(config).items()}
    shapes |= {"model.norm": (config.hidden_size,), "lm_head": (config.vocab_size, config.hidden_size)}
    for name, shape in shapes.items():
        made = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
        yield f"{name}.weight", made


def write(directory: Path, config: LlamaConfig, dtype: torch.dtype, seed: int) -> int:
    """The checkpoint, a shard at a time; returns its bytes."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors(config, seed):
        shard[name] = tensor.to(dtype)
        total += shard[name].nbytes
        if sum(x.nbytes for x in shard.values()) > SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def make(directory: Path, gigabytes: float, hidden: int, dtype: str, rows: int, length: int, seed: int = 0) -> int:
    """Returns the depth."""
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=heads, num_key_value_heads=heads // 4,
        vocab_size=1024, max_position_embeddings=length, num_hidden_layers=0, architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )  # fmt: skip
    layer = sum(torch.Size(shape).numel() for shape in layer_shapes(config).values()) * DTYPES[dtype].itemsize
    config.num_hidden_layers = max(1, round(gigabytes * 1e9 / layer))
    directory.mkdir(parents=True, exist_ok=True)
    write(directory, config, DTYPES[dtype], seed)
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    save_file({"input_ids": ids}, directory / "tokens.safetensors")
    config.save_pretrained(directory)
    return int(config.num_hidden_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gb", type=float, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    depth = make(a.out, a.gb, a.hidden, a.dtype, a.rows, a.length, a.seed)
    print(f"{a.out}: {depth} layers of width {a.hidden} in {a.dtype}")


if __name__ == "__main__":
    main()
