"""Checkpoints that are no plain Hugging Face ones: Meta's original layout, and vision-language models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from zoo import FEW, GEMMA, GROUPED

VOCABULARY, WIDTH, HEADS, KV_HEADS, HIDDEN, DEPTH = 128, 32, 4, 2, 48, 2
LLAMA2 = {"dim": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "multiple_of": 16,
          "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "vocab_size": -1}  # fmt: skip
LLAMA3 = LLAMA2 | {"rope_theta": 500000.0, "vocab_size": VOCABULARY}
LLAMA31 = LLAMA3 | {"use_scaled_rope": True}
SCALED = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ROWS = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3", "output")
COLUMNS = ("attention.wo", "feed_forward.w2")


def twin(params: Mapping[str, Any] = LLAMA2, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers has it, made by hand."""
    scaled = {"rope_type": "llama3", **SCALED} if params.get("use_scaled_rope") else {"rope_type": "default"}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=params["norm_eps"],
        rope_parameters=scaled | {"rope_theta": params.get("rope_theta", 10000.0)}, max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head as Meta has them: element by element, the slow way."""
    rows = len(weight)
    size = rows // heads
    out = torch.empty_like(weight)
    for head in range(heads):
        for pair in range(size // 2):
            out[head * size + 2 * pair] = weight[head * size + pair]
            out[head * size + 2 * pair + 1] = weight[head * size + size // 2 + pair]
    return out


def original(model: Any) -> dict[str, Tensor]:
    """A model's tensors under Meta's names and in Meta's order of rows."""
    found: dict[str, Tensor] = {"rope.freqs": torch.ones(4)}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        for theirs, metas in NAMES.items():
            name = name.replace(f"{theirs}.", f"{metas}.")
        found[name] = neighbours(tensor, heads) if heads else tensor.clone()
    return found


def write_meta(directory: Path, params: Mapping[str, Any], model: Any, parts: int = 1, embedding: int = 1) -> Path:
    """The layout in so many parts. embedding: the dimension along which the embedding is divided."""
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(params))
    divided = {key: divide(key.removesuffix(".weight"), tensor, parts, embedding)
               for key, tensor in original(model).items()}  # fmt: skip
    for part in range(parts):
        torch.save({key: pieces[part].clone() for key, pieces in divided.items()},
                   directory / f"consolidated.{part:02}.pth")  # fmt: skip
    return directory


def divide(name: str, tensor: Tensor, parts: int, embedding: int) -> list[Tensor]:
    if name == "tok_embeddings":
        return list(tensor.chunk(parts, embedding))
    if name.endswith(ROWS):
        return list(tensor.chunk(parts, 0))
    return list(tensor.chunk(parts, 1)) if name.endswith(COLUMNS) else [tensor] * parts


TOWER = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
}  # fmt: skip
"""Heavier than the language part."""


def clip(depth: int) -> Any:
    return transformers.CLIPVisionConfig(**TOWER, num_hidden_layers=depth, projection_dim=16)


def llava(depth: int) -> Any:
    text = transformers.LlamaConfig(**GROUPED)
    return transformers.LlavaConfig(vision_config=clip(depth), text_config=text, image_token_index=5)


def qwen2_vl(depth: int) -> Any:
    vision = {"depth": depth, "embed_dim": 64, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 4, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return transformers.Qwen2VLConfig(
        vision_config=vision, text_config=GROUPED | {"rope_parameters": rope}, image_token_id=5, video_token_id=6,
        vision_start_token_id=7, vision_end_token_id=8,
    )  # fmt: skip


def gemma3(depth: int) -> Any:
    vision = transformers.SiglipVisionConfig(**TOWER, num_hidden_layers=depth)
    text = transformers.Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=8)
    return transformers.Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=4, image_token_index=5, boi_token_index=6,
        eoi_token_index=7,
    )  # fmt: skip


def mistral3(depth: int) -> Any:
    vision = transformers.PixtralVisionConfig(**TOWER, num_hidden_layers=depth)
    text = transformers.MistralConfig(**GROUPED, head_dim=8)
    return transformers.Mistral3Config(vision_config=vision, text_config=text, image_token_index=5)


def qwen3_vl_moe(depth: int) -> Any:
    vision = {
        "depth": depth, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
        "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = FEW | {"head_dim": 8, "rope_parameters": rope}
    return transformers.Qwen3VLMoeConfig(
        vision_config=vision, text_config=text, image_token_id=5, video_token_id=6, vision_start_token_id=7,
        vision_end_token_id=8,
    )  # fmt: skip


FAMILIES: dict[str, tuple[Callable[[int], Any], int]] = {
    "llava": (llava, 2), "qwen2_vl": (qwen2_vl, 2), "gemma3": (gemma3, 3), "mistral3": (mistral3, 2),
}  # fmt: skip


MIXTURE = qwen3_vl_moe, 2


def made(family: str, path: Path, depth: int | None = None) -> Path:
    """A random checkpoint. depth: of the vision tower; the language part's own where it is not told."""
    make, own = (FAMILIES | {"qwen3_vl_moe": MIXTURE})[family]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(make(depth or own), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(path)
    return path
