"""What a network is timed at: the work of inference, in phases. One value for each kind of input."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from obsprune.errors import InputError
from obsprune.models.pixels import output_size
from obsprune.models.ready import Ready

PROMPT = 128
"""Tokens, where the model has room for them and nobody says another number."""
Clock = Callable[[], float]
"""Seconds from some moment on."""


@dataclass(frozen=True)
class Done:
    """Seconds of each phase, and what came out, to compare."""

    seconds: dict[str, float]
    output: Tensor


class Workload(ABC):
    """What is done once in a measurement."""

    @property
    @abstractmethod
    def phases(self) -> tuple[str, ...]:
        """Its parts, which are timed one by one."""

    @property
    @abstractmethod
    def said(self) -> str:
        """The whole, for a person."""

    @abstractmethod
    def inputs(self, batch: int) -> Tensor:
        """Random inputs, the same at each call."""

    @abstractmethod
    def run(self, network: Any, inputs: Tensor, clock: Clock) -> Done:
        """One measurement."""


@final
@dataclass(frozen=True)
class Generation(Workload):
    """A prompt is read (prefill), then further tokens one by one with a cache (decode), as `generate` does it. Tokens
    are drawn, not chosen, so that every network has the same work. Decode is the time of a step: a token of each
    sequence.
    """

    vocabulary: int
    prompt: int
    new: int
    device: torch.device

    @property
    def phases(self) -> tuple[str, ...]:
        return ("prefill", "decode") if self.new else ("prefill",)

    @property
    def said(self) -> str:
        return f"prefill of {self.prompt} tokens, then {self.new} decoded one by one"

    def inputs(self, batch: int) -> Tensor:
        drawn = torch.randint(self.vocabulary, (batch, self.prompt + self.new), generator=_seeded())
        return drawn.to(self.device)

    def run(self, network: Any, inputs: Tensor, clock: Clock) -> Done:
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
        began = clock()
        out = network(inputs[:, : self.prompt], use_cache=bool(self.new), **last)
        read = clock()
        outputs, cache = [out.logits[:, -1:]], out.get("past_key_values")
        if self.new and cache is None:
            raise InputError(f"a {network.config.model_type} model keeps no cache to decode with; use --new 0")
        for place in range(self.prompt, self.prompt + self.new):
            out = network(inputs[:, place : place + 1], past_key_values=cache, use_cache=True)
        ended = clock()
        decode = {"decode": (ended - read) / self.new} if self.new else {}
        return Done({"prefill": read - began, **decode}, torch.cat([*outputs, out.logits[:, -1:]]))


@final
@dataclass(frozen=True)
class Classification(Workload):
    """One forward of images as large as the model's own processor makes them."""

    channels: int
    size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    phases = ("forward",)

    @property
    def said(self) -> str:
        return f"a forward of images of {self.size[0]} x {self.size[1]}"

    def inputs(self, batch: int) -> Tensor:
        return torch.randn(batch, self.channels, *self.size, generator=_seeded()).to(self.device, self.dtype)

    def run(self, network: Any, inputs: Tensor, clock: Clock) -> Done:
        began = clock()
        logits = network(pixel_values=inputs).logits
        return Done({"forward": clock() - began}, logits)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _generation(ready: Ready, prompt: int | None, new: int) -> Workload:
    """Raises InputError when the model cannot read so much."""
    text = ready.network.config.get_text_config()
    most = int(getattr(text, "max_position_embeddings", None) or PROMPT + new)
    length = prompt or min(PROMPT, most - new)
    if length < 1 or length + new > most:
        raise InputError(
            f"{ready.name} has room for {most} tokens, and a prompt of {max(length, 1)} and {new} new ones are more; "
            "use a smaller --prompt or --new"
        )
    return Generation(int(text.vocab_size), length, new, ready.device)


def _classification(ready: Ready, prompt: int | None, new: int) -> Workload:
    size = output_size(ready.processor)
    return Classification(getattr(ready.network.config, "num_channels", 3), size, ready.device, ready.dtype)


WORKLOADS: dict[str, Callable[[Ready, int | None, int], Workload]] = {"text": _generation, "images": _classification}
"""By what a kind of model reads: (model, tokens of the prompt or None, new ones) -> its work."""
