"""`from_pretrained` on packed checkpoints: one adapter over what transformers 5 reads files with.

Their config.json says quant_method "obsprune". Without this module transformers does not know it, warns, looks for
model.safetensors, finds none and raises OSError. With it, `Packed` names the packed files, and they are opened as any
safetensors file is, each tensor unpacked when it is asked for: conversions of names, mixtures of experts, casts and
devices all see what they see of a dense checkpoint. Afterwards the model is an ordinary one.

Imported by `import obsprune`, as soon as transformers' modeling_utils is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, final

from torch import Tensor
from transformers import modeling_utils
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from obsprune.errors import InputError
from obsprune.models.checkpoint import PACKED_INDEX
from obsprune.models.packed import (
    BEGINNING,
    LENGTH,
    METHOD,
    VERSION,
    PackedCheckpoint,
    PackedFile,
    Stored,
)

PACKED_NAME = re.compile(r"obsprune-\d+-of-\d+\.safetensors")


@register_quantization_config(METHOD)
@final
class PackedConfig(QuantizationConfigMixin):
    """What config.json says of a packed checkpoint. dequantize: transformers forgets it once the weights are there."""

    def __init__(self, version: int = VERSION, **_: Any) -> None:
        self.quant_method = cast(Any, METHOD)  # transformers takes texts, too
        self.version, self.dequantize = version, True


@register_quantizer(METHOD)
@final
class Packed(HfQuantizer):
    """Says which files to read, checks them before, and what became of them afterwards."""

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if not self.pre_quantized:
            raise InputError("from_pretrained cannot pack a model; obsprune pack DIRECTORY -o PACKED does")

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that transformers shows its config to, before it looks for files."""
        config.transformers_weights = PACKED_INDEX
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same, for transformers up to 5.17."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: Any, **known: Any) -> Any:
        PackedCheckpoint.open(_folder(known["checkpoint_files"]))
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        del model.config.transformers_weights
        if "disk" in getattr(model, "hf_device_map", {}).values():  # accelerate would read the files by itself
            raise InputError("weights of a packed checkpoint cannot stay on the disk; obsprune unpack it first")
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _folder(files: list[str]) -> Path:
    """Where packed files lie. Raises InputError for others: their config was copied from a packed checkpoint."""
    if not all(PACKED_NAME.fullmatch(Path(file).name) for file in files):
        raise InputError(f"{files[0]} is not packed, and its config.json says so; take its quantization_config out")
    return Path(files[0]).parent


@final
class _Slice:
    """A tensor that is unpacked when it is asked for."""

    def __init__(self, file: PackedFile, stored: Stored) -> None:
        self.file, self.stored = file, stored

    def __getitem__(self, index: Any) -> Tensor:
        return self.file.tensor(self.stored)[index]

    def get_dtype(self) -> str:
        return self.stored.dtype

    def get_shape(self) -> list[int]:
        return list(self.stored.shape)


@final
class _Opened:
    """A packed file, as safetensors.safe_open shows a dense one."""

    def __init__(self, path: Path) -> None:
        self.slices = {stored.name: _Slice(file, stored) for file in [PackedFile(path)] for stored in file.tensors}

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}

    def keys(self) -> list[str]:
        return list(self.slices)

    def get_slice(self, name: str) -> _Slice:
        return self.slices[name]

    def get_tensor(self, name: str) -> Tensor:
        return self.slices[name][...]


def opening_packed(plain: Callable[..., Any]) -> Callable[..., Any]:
    """safe_open that also opens packed files."""

    def safe_open(path: Any, *arguments: Any, **named: Any) -> Any:
        return _Opened(Path(path)) if PACKED_NAME.fullmatch(Path(path).name) else plain(path, *arguments, **named)

    return safe_open


def refusing_packed(plain: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Reading a whole file without a map, which cannot be done for packed ones."""

    def load(data: bytes) -> Any:
        if data.startswith(BEGINNING, LENGTH.size):
            raise InputError("packed files are read through a memory map: leave out disable_mmap, or unpack them first")
        return plain(data)

    return load


joint: Any = modeling_utils
joint.safe_open = opening_packed(joint.safe_open)
joint._safe_load_bytes = refusing_packed(joint._safe_load_bytes)
