"""A checkpoint as those who use it load it: by from_pretrained, whole, on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from obsprune.errors import InputError, first_line
from obsprune.models.config import read_config
from obsprune.models.kinds import Kind, kind_of
from obsprune.models.load import choose_device, choose_dtype, locate, open_checkpoint


@dataclass(frozen=True)
class Ready:
    """A network that can be called, on its device and in its dtype."""

    name: str
    directory: Path
    kind: Kind
    network: Any
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool

    @property
    def processor(self) -> Any:
        """The tokenizer, or image processor. Raises InputError when the directory has none."""
        return self.kind.processor(self.directory, self.trust_remote_code)


def make_ready(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Ready:
    """Loads `demo`, a directory, or a Hugging Face id. dtype: of the weights (`auto`: as stored; float16 becomes
    float32 on a CPU). Raises InputError when it cannot be loaded, or lacks weights.
    """
    directory = locate(name, revision, token)
    checkpoint = open_checkpoint(directory)
    kind = kind_of(read_config(checkpoint.directory, trust_remote_code))
    place = choose_device(device)
    compute = choose_dtype(dtype, checkpoint, place)
    try:
        with without_bars():
            network, told = kind.auto.from_pretrained(
                directory, dtype=compute, trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except Exception as error:  # every model class fails in its own way
        raise InputError(f"transformers cannot load {directory} ({first_line(error)})") from error
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise InputError(f"{directory} lacks {missing[0]} and {len(missing) - 1} other weights; download it again")
    network = network.to(place).eval().requires_grad_(False)
    return Ready(name, directory, kind, network, place, compute, trust_remote_code)


@contextmanager
def without_bars() -> Iterator[None]:
    """While open, transformers shows no progress of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
