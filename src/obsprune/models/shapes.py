"""Published architectures by name, at their true shape without their weights, to plan by, and made small, to try by.

The values are those of each checkpoint's config.json on the hub.
"""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from obsprune.errors import InputError, nearest
from obsprune.models.checkpoint import SINGLE, in_shards, write_index, write_shard, write_text
from obsprune.models.files import DTYPES
from obsprune.models.kinds import Kind, kind_of
from obsprune.progress import Progress

ROWS, IMAGES_MADE = 64, 40
"""How many samples a tiny checkpoint brings."""
SHARD = 2e9
"""Bytes that a file of an outline pretends to have; who opens it maps them all, and systems refuse to map too many."""


class Inputs(ABC):
    """Random samples of the kind that a tiny checkpoint reads. dataset: what they are called once they are written."""

    @abstractmethod
    def write(self, folder: Path, config: Any, generator: torch.Generator, count: int | None = None) -> None:
        """Makes so many of them in a checkpoint's folder, with what it needs to read them."""

    @abstractmethod
    def dataset(self, folder: Path) -> str:
        """The name by which `--dataset` and `--eval` take them."""


@final
class RandomTokens(Inputs):
    """tokens.safetensors: rows of token ids as long as the model takes, a few ids frequent as in a language."""

    name = "tokens.safetensors"

    def write(self, folder: Path, config: Any, generator: torch.Generator, count: int | None = None) -> None:
        drawn = torch.rand(count or ROWS, config.max_position_embeddings, generator=generator)
        write_shard(folder / self.name, {"input_ids": (drawn.square() * config.vocab_size).long()})

    def dataset(self, folder: Path) -> str:
        return str(folder / self.name)


@final
class RandomImages(Inputs):
    """labels.tsv and images/*.png of coloured areas, their classes by turns; and the config of an image processor."""

    name = "labels.tsv"

    def write(self, folder: Path, config: Any, generator: torch.Generator, count: int | None = None) -> None:
        side, made = config.image_size, count or IMAGES_MADE
        (folder / "images").mkdir(exist_ok=True)
        for index in range(made):
            coarse = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"images/{index}.png")
        lines = (f"images/{index}.png\t{index % config.num_labels}\n" for index in range(made))
        write_text(folder / self.name, "".join(lines))
        processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}
        write_text(folder / "preprocessor_config.json", json.dumps(processor))

    def dataset(self, folder: Path) -> str:
        return f"imagenet={folder / self.name}"


INPUTS: dict[str, Inputs] = {"text": RandomTokens(), "images": RandomImages()}
"""By what a kind of model reads."""


@dataclass(frozen=True)
class Shape:
    """One architecture. id: its checkpoint on the hub; dtype: of the weights there; values: of its config; small: what
    a tiny one has in their place, heads, shared heads, biases and order of norms as in the true one.
    """

    model_type: str
    id: str
    dtype: str
    values: Mapping[str, Any]
    small: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reduced(self) -> Shape:
        """The tiny one's shape."""
        return replace(self, values={**self.values, **self.small}, small={})

    @property
    def inputs(self) -> Inputs:
        """What a tiny one brings to read."""
        return INPUTS[self.kind.reads]

    @property
    def kind(self) -> Kind:
        """What goes in and what comes out."""
        return kind_of(self._config())

    def outline(self, folder: Path) -> None:
        """A checkpoint without a weight: config.json, and shards with the header of every tensor and a hole where the
        data would be. It can be planned by (obsprune.models.load.outline); who loads it gets zeros.
        """
        network = self._network("meta")
        network.config.save_pretrained(folder)
        for name, tensors in self._files(network).items():
            _write_headers(folder / name, tensors)
        write_index(folder)

    def tiny(self, folder: Path, seed: int = 0) -> str:
        """A small checkpoint of the same architecture with random weights, and random samples for it; returns the
        `dataset` they are. The same seed gives the same bytes.
        """
        generator = torch.Generator().manual_seed(seed)
        network = replace(self.reduced, dtype="float32")._network("cpu")
        _randomise(network.parameters(), generator)
        write_shard(folder / SINGLE, _stored(network))
        network.config.save_pretrained(folder)
        self.inputs.write(folder, network.config, generator)
        return self.inputs.dataset(folder)

    def filled(self, folder: Path, device: torch.device, progress: Progress, seed: int = 0) -> None:
        """A checkpoint of this very size with random weights, drawn on a device, a file at a time. The same seed and
        device give the same bytes.
        """
        network, generator = self._network("meta"), torch.Generator(device).manual_seed(seed)
        files = self._files(network)
        progress.stage(f"random weights of {self.id}", len(files))
        for file, tensors in files.items():
            write_shard(folder / file, {name: _drawn(name, x, generator).cpu() for name, x in tensors.items()})
            progress.step(file)
        write_index(folder)
        network.config.save_pretrained(folder)

    def samples(self, folder: Path, count: int, seed: int = 0) -> str:
        """So many random samples for this architecture, in a checkpoint's folder; returns the `dataset` they are."""
        self.inputs.write(folder, self._config(), torch.Generator().manual_seed(seed), count)
        return self.inputs.dataset(folder)

    def deep(self, blocks: int | None) -> Shape:
        """The same with so many blocks alone; None: as it is. Raises InputError."""
        depth = self.values.get("num_hidden_layers")
        if blocks is None or blocks == depth:
            return self
        if depth is None or not 1 <= blocks <= depth:
            possible = f"1 to {depth}" if depth else "all"
            raise InputError(f"{blocks} blocks of {self.id} cannot be had; {possible} can")
        return replace(self, values={**self.values, "num_hidden_layers": blocks})

    def _config(self) -> Any:
        return AutoConfig.for_model(self.model_type, **self.values)

    def _files(self, network: Any) -> dict[str, dict[str, Tensor]]:
        """{file: its tensors} of a checkpoint of this network."""
        tensors = _stored(network)
        parts = in_shards({name: tensor.nbytes for name, tensor in tensors.items()}, SHARD)
        return {
            f"model-{number:05d}.safetensors": {name: tensors[name] for name in names}
            for number, names in enumerate(parts)
        }

    def _network(self, device: str) -> Any:
        config = self._config()
        with torch.random.fork_rng(devices=[]), torch.device(device):
            network = kind_of(config).auto.from_config(config, dtype=getattr(torch, self.dtype))
        network.config.architectures = [type(network).__name__]
        return network.eval()


def _stored(network: Any) -> dict[str, Tensor]:
    """Its tensors under the names of the hub; of those that are one (a tied head) the first alone."""
    tensors = network.state_dict(keep_vars=True)
    firsts = {id(tensor): name for name, tensor in reversed(tensors.items())}
    once = {name: tensors[name].detach() for name in sorted(firsts.values())}
    found: dict[str, Tensor] = revert_weight_conversion(network, once)
    return found


def _randomise(parameters: Iterable[Tensor], generator: torch.Generator) -> None:
    """Matrices at He's scale; the rest a little off where it is, for biases at 0 and norms at 1 would hide errors."""
    with torch.no_grad():
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(drawn * (2 / parameter[0].numel()) ** 0.5)
            else:
                parameter.add_(drawn, alpha=0.1)


def _drawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random where there are two dimensions or more, so that outputs are as large as inputs; else what leaves a norm or
    a bias without effect.
    """
    if like.dim() < 2:
        return torch.full(like.shape, float(name.endswith(("weight", "var"))), dtype=like.dtype)
    drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return drawn.mul_(like[0].numel() ** -0.5).to(like.dtype)


def _write_headers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file whose data are a hole, which reads as zeros and takes no room on the disk."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)


TEXT = {"vocab_size": 128, "max_position_embeddings": 64, "num_hidden_layers": 2}
IMAGES = {"image_size": 32, "num_labels": 10}


def _deit(size: str, heads: int) -> Shape:
    return Shape(
        "vit", f"facebook/deit-{size}-patch16-224", "float32",
        {"hidden_size": 64 * heads, "intermediate_size": 256 * heads, "num_hidden_layers": 12,
         "num_attention_heads": heads, "image_size": 224, "patch_size": 16, "num_labels": 1000},
        IMAGES | {"hidden_size": 8 * heads, "intermediate_size": 32 * heads, "num_hidden_layers": 2, "patch_size": 8},
    )  # fmt: skip


def _opt(size: str, hidden: int, layers: int, heads: int, first: bool = True, embedded: int | None = None) -> Shape:
    """first: whether norms come before what they are for; embedded: width of the embedding, where it is another."""
    return Shape(
        "opt", f"facebook/opt-{size}", "float16",
        {"hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
         "word_embed_proj_dim": embedded or hidden, "do_layer_norm_before": first, "vocab_size": 50272,
         "max_position_embeddings": 2048, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
         "tie_word_embeddings": True},
        TEXT | {"hidden_size": 32, "ffn_dim": 128, "num_attention_heads": 4,
                "word_embed_proj_dim": 32 * (embedded or hidden) // hidden},
    )  # fmt: skip


def _llama(id: str, dtype: str, hidden: int, inner: int, layers: int, heads: int, sharing: int, **more: Any) -> Shape:
    """sharing: how many heads have the same keys and values."""
    return Shape(
        "llama", id, dtype,
        {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
         "num_key_value_heads": heads // sharing, "rms_norm_eps": 1e-5, "vocab_size": 32000,
         "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, **more},
        TEXT | {"hidden_size": 16 * sharing, "intermediate_size": 32 * sharing, "num_attention_heads": 2 * sharing,
                "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2},
    )  # fmt: skip


SHAPES: dict[str, Shape] = {
    "deit-tiny": _deit("tiny", 3),
    "deit-small": _deit("small", 6),
    "deit-base": _deit("base", 12),
    "mobilenet-v1": Shape(
        "mobilenet_v1", "google/mobilenet_v1_1.0_224", "float32",
        {"depth_multiplier": 1.0, "image_size": 224, "layer_norm_eps": 1e-3, "num_labels": 1001},
        IMAGES | {"depth_multiplier": 0.125},
    ),
    "opt-125m": _opt("125m", 768, 12, 12),
    "opt-350m": _opt("350m", 1024, 24, 16, first=False, embedded=512),
    "opt-1.3b": _opt("1.3b", 2048, 24, 32),
    "opt-2.7b": _opt("2.7b", 2560, 32, 32),
    "opt-6.7b": _opt("6.7b", 4096, 32, 32),
    "opt-13b": _opt("13b", 5120, 40, 40),
    "opt-30b": _opt("30b", 7168, 48, 56),
    "opt-66b": _opt("66b", 9216, 64, 72),
    "phi-1.5": Shape(
        "phi", "microsoft/phi-1_5", "float16",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
         "partial_rotary_factor": 0.5, "vocab_size": 51200, "max_position_embeddings": 2048},
        TEXT | {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4},
    ),
    "llama-2-7b": _llama("meta-llama/Llama-2-7b-hf", "float16", 4096, 11008, 32, 32, 1),
    "llama-2-70b": _llama("meta-llama/Llama-2-70b-hf", "float16", 8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama(
        "meta-llama/Meta-Llama-3-8B", "bfloat16", 4096, 14336, 32, 32, 4, vocab_size=128256,
        max_position_embeddings=8192, rope_theta=500000.0, bos_token_id=128000, eos_token_id=128001,
    ),
}  # fmt: skip


def find_shape(name: str) -> Shape:
    """One of SHAPES. Raises InputError."""
    if name not in SHAPES:
        raise InputError(f"unknown shape '{name}'; {nearest(name, SHAPES)}")
    return SHAPES[name]
