"""Tiny random checkpoints of many families, made on disk once a session, and token rows for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

VOCABULARY, LENGTH = 128, 64
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": LENGTH,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
GEMMA = GROUPED | {
    "num_hidden_layers": 3,
    "head_dim": 8,
    "sliding_window": 8,  # shorter than the rows, so that the two kinds of layers have different masks
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FALCON = {key: value for key, value in COMMON.items() if key != "intermediate_size"} | {"alibi": False, "bias": False}

GPT2_SIZE = SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
BLOOM_SIZE = SMALL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}


@dataclass(frozen=True)
class Family:
    """One architecture: its config, how deep it is, where its blocks are, and the layers to prune inside a block."""

    config: str
    options: dict[str, Any]
    blocks: str
    layers: tuple[str, ...]
    tied: bool = False

    @property
    def depth(self) -> int:
        return int(self.options.get("num_hidden_layers") or self.options["n_layer"])

    @property
    def matrices(self) -> list[str]:
        return [f"{self.blocks}.{index}.{layer}" for index in range(self.depth) for layer in self.layers]


QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA = (*QKVO, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OPT = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
PHI = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2")
FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
NEOX = tuple(f"{owner}.{name}" for owner, name in zip(("attention", "attention", "mlp", "mlp"), FUSED, strict=True))
BLOOM = tuple(name.replace("attention.", "self_attention.") for name in NEOX)

ZOO: dict[str, Family] = {
    "llama": Family("LlamaConfig", GROUPED | {"num_hidden_layers": 3}, "model.layers", LLAMA),
    "llama-tied": Family("LlamaConfig", GROUPED | {"tie_word_embeddings": True}, "model.layers", LLAMA, tied=True),
    "mistral": Family("MistralConfig", GROUPED | {"sliding_window": 8}, "model.layers", LLAMA),
    "qwen2": Family("Qwen2Config", GROUPED, "model.layers", LLAMA),
    "qwen3": Family("Qwen3Config", GROUPED | {"head_dim": 16}, "model.layers", LLAMA),
    "olmo2": Family("Olmo2Config", GROUPED, "model.layers", LLAMA),
    "gemma2": Family("Gemma2Config", GEMMA | {"query_pre_attn_scalar": 8}, "model.layers", LLAMA, tied=True),
    "gemma3": Family("Gemma3TextConfig", GEMMA | {"query_pre_attn_scalar": 8}, "model.layers", LLAMA, tied=True),
    "phi": Family("PhiConfig", COMMON, "model.layers", PHI),
    "opt": Family("OPTConfig", COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "model.decoder.layers", OPT, True),
    "gpt2": Family("GPT2Config", GPT2_SIZE, "transformer.h", GPT2, True),
    "gpt_neox": Family("GPTNeoXConfig", COMMON, "gpt_neox.layers", NEOX),
    "bloom": Family("BloomConfig", BLOOM_SIZE, "transformer.h", BLOOM, True),
    "falcon-parallel": Family(
        "FalconConfig", FALCON | {"multi_query": True, "parallel_attn": True}, "transformer.h", BLOOM, True
    ),
    "falcon-new": Family(
        "FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "transformer.h", BLOOM, True
    ),
}  # fmt: skip

MIXTRAL = Family("MixtralConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, "model.layers", QKVO)

SHARED = GROUPED | {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "sliding_window": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4,
    "activation_sparsity_pattern": None, "intermediate_size": 48, "altup_num_inputs": 2,
}  # fmt: skip
SIDE_CHANNEL = Family("Gemma3nTextConfig", SHARED, "model.layers", LLAMA, tied=True)
"""Later layers read the keys and values of earlier ones from an object beside the arguments."""


@dataclass(frozen=True)
class Zoo:
    """Makes checkpoints under one folder, each once."""

    folder: Path

    def __call__(self, name: str, dtype: torch.dtype = torch.float32) -> Path:
        """The checkpoint of a family of ZOO; read it, never write to it."""
        return self.make(f"{name}-{str(dtype).removeprefix('torch.')}", ZOO[name], dtype)

    def make(self, label: str, family: Family, dtype: torch.dtype = torch.float32) -> Path:
        path = self.folder / label
        if not path.is_dir():
            random_model(family).to(dtype).save_pretrained(path)
        return path


def random_model(family: Family) -> Any:
    """Every parameter random: biases and norms at their usual 0 and 1 would hide errors."""
    config = getattr(transformers, family.config)(**family.options)
    config.tie_word_embeddings = family.tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def reference(directory: Path) -> Any:
    """The model as transformers itself loads it."""
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def token_rows(count: int, length: int = 32, seed: int = 0) -> Tensor:
    """Random token ids [count, length]; a few of them frequent, as in a language."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, length, generator=generator).square() * VOCABULARY).long()


def token_batches(count: int, size: int = 2, length: int = 24) -> list[dict[str, Tensor]]:
    """`count` batches of `size` rows as keyword arguments of a model."""
    return [{"input_ids": rows} for rows in token_rows(count * size, length).split(size)]


def logits(model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits
    return result


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.getbasetemp() / "zoo")  # one folder, wherever the fixture is asked for


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set: 24 rows of 32 token ids."""
    path = tmp_path_factory.getbasetemp() / "tokens.safetensors"
    save_file({"input_ids": token_rows(24)}, path)
    return path
