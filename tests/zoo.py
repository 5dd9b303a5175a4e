"""Tiny random checkpoints of many families, made on disk once a session, and token rows and pictures for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from obsprune.models.checkpoint import Checkpoint

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

CHOSEN = GROUPED | {"num_experts_per_tok": 2}
FEW = CHOSEN | {"num_experts": 6, "moe_intermediate_size": 24}
DEEPSEEK = CHOSEN | {
    "num_key_value_heads": 4, "n_routed_experts": 6, "n_shared_experts": 1, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 2, "topk_group": 1,
}  # fmt: skip
OSS = CHOSEN | {
    "num_local_experts": 6, "head_dim": 8, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
NEMOTRON = CHOSEN | {
    "n_routed_experts": 6, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24, "n_group": 1,
    "topk_group": 1, "head_dim": 8, "layers_block_type": ["attention", "moe"],
}  # fmt: skip


def routed(layer: str, count: int = 6, *names: str) -> tuple[str, ...]:
    """The matrices of all experts of a layer."""
    return tuple(f"{layer}.{index}.{name}" for index in range(count) for name in names or GATED)


GATED = ("gate_proj", "up_proj", "down_proj")
EXPERTS = (*QKVO, *routed("mlp.experts"))
SHARED_EXPERT = tuple(f"mlp.shared_expert.{name}" for name in GATED)
MIXTURES: dict[str, Family] = {
    "mixtral": Family("MixtralConfig", CHOSEN | {"num_local_experts": 6}, "model.layers", EXPERTS),
    "qwen2_moe": Family(
        "Qwen2MoeConfig", FEW | {"shared_expert_intermediate_size": 24}, "model.layers", (*EXPERTS, *SHARED_EXPERT)
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", FEW | {"head_dim": 8}, "model.layers", EXPERTS),
    "olmoe": Family("OlmoeConfig", FEW, "model.layers", EXPERTS),
    "phimoe": Family("PhimoeConfig", CHOSEN | {"num_local_experts": 6}, "model.layers", EXPERTS),
    "granitemoe": Family(
        "GraniteMoeConfig", CHOSEN | {"num_local_experts": 6}, "model.layers",
        (*QKVO, *routed("block_sparse_moe.experts")),
    ),
    "gpt_oss": Family("GptOssConfig", OSS, "model.layers", EXPERTS),
    "deepseek_v3": Family("DeepseekV3Config", DEEPSEEK, "model.layers", ()),
    "nemotron_h": Family("NemotronHConfig", NEMOTRON, "model.layers", ()),
}  # fmt: skip
"""Mixtures of experts. Their first layers can be others (DeepSeek, Nemotron): `layers` is empty then."""
DENSE_FIRST = CHOSEN | {
    "n_routed_experts": 6, "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {key: value for key, value in DEEPSEEK.items() if key not in ("n_group", "topk_group", "q_lora_rank")}
FULL = {"layer_types": ["full_attention", "full_attention"]}
MORE_MIXTURES: dict[str, Family] = {
    name: Family(config, options, "model.layers", ())
    for name, config, options in (
        ("deepseek_v2", "DeepseekV2Config", LATENT | {"q_lora_rank": None, "topk_method": "greedy"}),
        ("minimax", "MiniMaxConfig", CHOSEN | FULL | {"num_local_experts": 6, "head_dim": 8}),
        ("hunyuan_v1_moe", "HunYuanMoEV1Config", GROUPED | {"num_experts": 6, "moe_topk": 2, "head_dim": 8}),
        ("glm4_moe", "Glm4MoeConfig", DENSE_FIRST),
        ("dots1", "Dots1Config", DENSE_FIRST),
        ("flex_olmo", "FlexOlmoConfig", CHOSEN | {"num_experts": 6}),
        ("lfm2_moe", "Lfm2MoeConfig", FEW | FULL | {"num_dense_layers": 1}),
        ("qwen3_next", "Qwen3NextConfig", FEW | FULL | {"shared_expert_intermediate_size": 24, "head_dim": 8}),
        ("cohere2_moe", "Cohere2MoeConfig", CHOSEN | {"num_experts": 6}),
    )
}
"""For docs/models.md alone."""
UNWATCHED = Family("Llama4TextConfig", GROUPED | {"num_local_experts": 4, "head_dim": 8}, "model.layers", QKVO)
"""Experts whose implementation transformers does not let one choose."""
FLAT = Family(
    "DbrxConfig",
    {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": LENGTH, "vocab_size": VOCABULARY,
     "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
     "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "transformer.blocks", (),
)  # fmt: skip
"""DBRX: all experts of a layer one above the other in a matrix."""

SHARED = GROUPED | {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "sliding_window": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4,
    "activation_sparsity_pattern": None, "intermediate_size": 48, "altup_num_inputs": 2,
}  # fmt: skip
SIDE_CHANNEL = Family("Gemma3nTextConfig", SHARED, "model.layers", LLAMA, tied=True)
"""Later layers read the keys and values of earlier ones from an object beside the arguments."""

SIDE, LABELS = 32, 10
NORMALISED = {"do_normalize": True, "image_mean": [0.5, 0.45, 0.4], "image_std": [0.25, 0.25, 0.3]}
SQUARE = NORMALISED | {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
CROPPED = NORMALISED | {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}, "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
}  # fmt: skip
SHARE = NORMALISED | {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIDE}}
MOBILE = CROPPED | {"image_processor_type": "MobileNetV1ImageProcessor"}


@dataclass(frozen=True)
class Classifier:
    """One image classifier: its class, its config, its processor, and {block: layers to prune inside it}; depthwise:
    layers that are pruned only where that is asked for; renamed: stored under the names that transformers stores, not
    under the modules' own.
    """

    architecture: str
    options: dict[str, Any]
    processor: dict[str, Any]
    blocks: dict[str, tuple[str, ...]]
    depthwise: tuple[str, ...] = ()
    renamed: bool = True

    @property
    def layers(self) -> list[str]:
        return [f"{block}.{layer}" for block, layers in self.blocks.items() for layer in layers]

    @property
    def config(self) -> Any:
        return getattr(transformers, self.architecture).config_class(**self.options, num_labels=LABELS)


VIT_SIZE = {
    "image_size": SIDE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
DINO_SIZE = VIT_SIZE | {"mlp_ratio": 2}
SWIN_SIZE = {
    "image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4,
    "mlp_ratio": 2,
}  # fmt: skip
CONVNEXT_SIZE = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_scale_init_value": 0.5}
ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
ENCODER = (*ATTENTION, "mlp.fc1", "mlp.fc2")
SWIGLU = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BASIC = ("layer.0.convolution", "layer.1.convolution")
BOTTLENECK = (*BASIC, "layer.2.convolution")
EXCITED = (*BASIC, "layer.2.attention.0", "layer.2.attention.2", "layer.3.convolution")
SHORTCUT = ("shortcut.convolution",)


def stages(prefix: str, *layers: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Blocks of two stages, of depths 1 and 2."""
    names = (prefix.format(stage, index) for stage, index in ((0, 0), (1, 0), (1, 1)))
    return dict(zip(names, layers, strict=True))


def layers(prefix: str, count: int, *inside: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """`count` blocks; their layers as in `inside`, over and over."""
    return {f"{prefix}.{index}": inside[index % len(inside)] for index in range(count)}


def mobile2(padded: bool) -> Classifier:
    inside = ("expand_1x1.convolution", "reduce_1x1.convolution")
    options = {"depth_multiplier": 0.1, "finegrained_output": False, "tf_padding": padded, "output_stride": 16}
    filters = tuple(f"mobilenet_v2.layer.{index}.conv_3x3.convolution" for index in range(16))
    return Classifier(
        "MobileNetV2ForImageClassification", options, MOBILE, layers("mobilenet_v2.layer", 16, inside), filters
    )


CLASSIFIERS: dict[str, Classifier] = {
    "vit": Classifier("ViTForImageClassification", VIT_SIZE, SQUARE, layers("vit.layers", 2, ENCODER)),
    "deit": Classifier("DeiTForImageClassification", VIT_SIZE, CROPPED, layers("deit.layers", 2, ENCODER)),
    "deit-distilled": Classifier(
        "DeiTForImageClassificationWithTeacher", VIT_SIZE, CROPPED, layers("deit.layers", 2, ENCODER)
    ),
    "dinov2": Classifier(
        "Dinov2ForImageClassification", DINO_SIZE, CROPPED, layers("dinov2.encoder.layer", 2, ENCODER)
    ),
    "dinov2-swiglu": Classifier(
        "Dinov2ForImageClassification", DINO_SIZE | {"use_swiglu_ffn": True}, CROPPED,
        layers("dinov2.encoder.layer", 2, SWIGLU), renamed=False,
    ),
    "swin": Classifier(
        "SwinForImageClassification", SWIN_SIZE, SQUARE,
        stages("swin.encoder.layers.{}.blocks.{}", ENCODER, ENCODER, ENCODER),
    ),
    "convnext": Classifier(
        "ConvNextForImageClassification", CONVNEXT_SIZE, SHARE,
        stages("convnext.encoder.stages.{}.layers.{}", *[("pwconv1", "pwconv2")] * 3),
        tuple(f"convnext.encoder.stages.{place}.dwconv" for place in ("0.layers.0", "1.layers.0", "1.layers.1")),
    ),
    "resnet-basic": Classifier(
        "ResNetForImageClassification",
        {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}, SHARE,
        stages("resnet.encoder.stages.{}.layers.{}", BASIC, SHORTCUT + BASIC, BASIC),
    ),
    "resnet-bottleneck": Classifier(
        "ResNetForImageClassification",
        {"layer_type": "bottleneck", "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}, SHARE,
        stages("resnet.encoder.stages.{}.layers.{}", SHORTCUT + BOTTLENECK, SHORTCUT + BOTTLENECK, BOTTLENECK),
    ),
    "regnet": Classifier(
        "RegNetForImageClassification",
        {"layer_type": "y", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8}, SHARE,
        stages("regnet.encoder.stages.{}.layers.{}", SHORTCUT + EXCITED, SHORTCUT + EXCITED, EXCITED),
    ),
    "mobilenet_v1": Classifier(
        "MobileNetV1ForImageClassification", {"depth_multiplier": 0.0625}, MOBILE,
        layers("mobilenet_v1.layer", 26, (), ("convolution",)),
        tuple(f"mobilenet_v1.layer.{index}.convolution" for index in range(0, 26, 2)),
    ),
    "mobilenet_v2": mobile2(padded=False),
    "mobilenet_v2-tf": mobile2(padded=True),
}  # fmt: skip
"""MobileNetV1 pads as TensorFlow does, too: that is its default. RegNet's convolutions are in groups of 8 channels."""

FUSED_FFN = replace(CLASSIFIERS["dinov2-swiglu"], renamed=True)
"""As DINOv2's largest model is stored: gate and up in one tensor."""
PICTURED = CLASSIFIERS | {"dinov2-fused": FUSED_FFN}


@dataclass(frozen=True)
class Zoo:
    """Makes checkpoints under one folder, each once."""

    folder: Path

    def __call__(self, name: str, dtype: torch.dtype = torch.float32) -> Path:
        """The checkpoint of a family of ZOO, MIXTURES, MORE_MIXTURES or PICTURED; read it, never write to it."""
        label = f"{name}-{str(dtype).removeprefix('torch.')}"
        family = (ZOO | MIXTURES | MORE_MIXTURES).get(name)
        return self.make(label, family, dtype) if family else self.classifier(label, PICTURED[name], dtype)

    def make(self, label: str, family: Family, dtype: torch.dtype = torch.float32) -> Path:
        path = self.folder / label
        if not path.is_dir():
            random_model(family).to(dtype).save_pretrained(path)
        return path

    def classifier(self, label: str, family: Classifier, dtype: torch.dtype = torch.float32) -> Path:
        path = self.folder / label
        if not path.is_dir():
            model = random_classifier(family).to(dtype)
            model.save_pretrained(path)
            if not family.renamed:
                save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
            (path / "preprocessor_config.json").write_text(json.dumps(family.processor))
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


def random_classifier(family: Classifier) -> Any:
    """As random_model; matrices at He's scale, batch norms with the statistics of some pictures, and well off them."""
    torch.manual_seed(0)
    model = getattr(transformers, family.architecture)(family.config).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() in (2, 4):
                parameter.copy_(torch.randn_like(parameter) * (2 / parameter[0].numel()) ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for norm in norms:
            norm.momentum = 1.0
        model(**pixel_batches(1, 32)[0])
        for norm in norms:
            norm.running_mean.add_(torch.randn_like(norm.running_mean) * norm.running_var.sqrt(), alpha=0.3)
            norm.running_var.mul_(0.5 + 1.5 * torch.rand_like(norm.running_var))
    return model.eval()


def reference(directory: Path) -> Any:
    """The model as transformers itself loads it; experts one by one, for its default sums them in another order."""
    return AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").eval()


def reference_classifier(directory: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(directory).eval()


def token_rows(count: int, length: int = 32, seed: int = 0) -> Tensor:
    """Random token ids [count, length]; a few of them frequent, as in a language."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, length, generator=generator).square() * VOCABULARY).long()


def token_batches(count: int, size: int = 2, length: int = 24) -> list[dict[str, Tensor]]:
    """`count` batches of `size` rows as keyword arguments of a model."""
    return [{"input_ids": rows} for rows in token_rows(count * size, length).split(size)]


def smooth(generator: np.random.Generator, height: int, width: int) -> Any:
    """One random picture, uint8 [height, width, 3]: large coloured shapes, and a little noise."""
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), 3)
    return np.clip(np.asarray(coarse) + generator.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def pixel_batches(count: int, size: int = 2) -> list[dict[str, Tensor]]:
    """`count` batches of `size` images as keyword arguments of a model."""
    generator = np.random.default_rng(0)
    made = np.stack([smooth(generator, SIDE, SIDE) for _ in range(count * size)])
    values = (torch.from_numpy(made).permute(0, 3, 1, 2).float() / 128 - 1).contiguous()
    return [{"pixel_values": part} for part in values.split(size)]


def logits(model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits
    return result


def tensors(directory: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds."""
    checkpoint = Checkpoint.open(directory)
    return checkpoint.read(checkpoint.headers)


def shards(directory: Path) -> dict[str, bytes]:
    """A checkpoint's files, byte by byte."""
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.getbasetemp() / "zoo")  # one folder, wherever the fixture is asked for


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens_in(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_in(tmp_path_factory.getbasetemp())


def tokens_in(folder: Path) -> Path:
    """A data set: 24 rows of 32 token ids."""
    path = folder / "tokens.safetensors"
    save_file({"input_ids": token_rows(24)}, path)
    return path


def pictures_in(parent: Path) -> Path:
    """A labels file beside 24 small images of many odd sizes, JPEG and PNG, colour and grey, with classes 0 to 9."""
    folder = parent / "pictures"
    if not folder.is_dir():
        folder.mkdir()
        generator, lines = np.random.default_rng(0), []
        for index in range(24):
            height, width = (2 * int(half) + 1 for half in generator.integers(16, 36, 2))
            picture = Image.fromarray(smooth(generator, height, width))
            name = f"{index:02}.{'png' if index % 3 else 'jpg'}"
            (picture.convert("L") if index % 5 == 0 else picture).save(folder / name)
            lines.append(f"{name}\t{index % LABELS}\n")
        (folder / "labels.tsv").write_text("".join(lines))
    return folder / "labels.tsv"
