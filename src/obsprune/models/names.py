"""Checkpoint names and module names: one adapter over what transformers 5 keeps private.

The hub's names differ from the modules' (a missing base prefix in gpt2, renamed layers), and some parameters are put
together from several stored tensors, or several from one (the experts of a mixture, gate and up of a feed-forward
layer). transformers converts on load and back on save; here both are done for the tensors of one block.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from obsprune.errors import InputError, first_line
from obsprune.models.files import Header

Tensors = dict[str, Tensor]
NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
"""Of layers and experts in a name."""


class Part(ABC):
    """Stored tensors that become parameters together. keys: theirs in the checkpoint; names: of the parameters."""

    keys: tuple[str, ...]
    names: tuple[str, ...]

    @abstractmethod
    def join(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """{key: tensor} -> {name: parameter}."""

    @abstractmethod
    def split(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """{name: parameter} -> {key: tensor}: what `join` would make the same parameters of."""


@final
class Plain(Part):
    """One tensor that is one parameter."""

    def __init__(self, key: str, name: str) -> None:
        self.keys, self.names = (key,), (name,)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensors:
        return {self.names[0]: tensors[self.keys[0]]}

    def split(self, parameters: Mapping[str, Tensor]) -> Tensors:
        return {self.keys[0]: parameters[self.names[0]]}


@final
class Fused(Part):
    """Tensors that transformers stacks, concatenates, cuts or turns. renamed: {key: its name before conversion}."""

    def __init__(self, naming: _Naming, converter: Any, renamed: Mapping[str, str]) -> None:
        self.naming, self.converter, self.renamed = naming, converter, dict(renamed)
        self.keys = tuple(self.renamed)
        shapes = {key: torch.empty(naming.headers[key].shape, device="meta") for key in self.keys}
        joined = self._converted(self.converter, {self.renamed[key]: x for key, x in shapes.items()})
        self.made = {name: naming.final(name) for name in joined}
        apart = self._converted(converter.reverse_transform(), joined)
        if lacking := apart.keys() - set(self.renamed.values()):  # experts are stacked whatever their numbers are
            raise self._unfit(f"{min(lacking)} is missing")
        self.names = tuple(self.made.values())
        self._check({self.made[name]: tuple(x.shape) for name, x in joined.items()})

    def join(self, tensors: Mapping[str, Tensor]) -> Tensors:
        joined = self._converted(self.converter, {self.renamed[key]: tensors[key] for key in self.keys})
        return {self.made[name]: tensor for name, tensor in joined.items()}

    def split(self, parameters: Mapping[str, Tensor]) -> Tensors:
        by_name = {name: parameters[final] for name, final in self.made.items()}
        found = self._converted(self.converter.reverse_transform(), by_name)
        if found.keys() != set(self.renamed.values()):
            raise InputError(f"{self.names[0]} cannot be stored as {self.keys[0]} was; its layout is not known")
        return {key: self._as_stored(key, found[name]) for key, name in self.renamed.items()}

    def _as_stored(self, key: str, tensor: Tensor) -> Tensor:
        """The way round it was: where transformers turns by shape alone (Qwen3-VL-MoE), it does not turn back."""
        shape = self.naming.headers[key].shape
        as_stored = tensor if tuple(tensor.shape) == shape else tensor.transpose(-1, -2)
        if tuple(as_stored.shape) != shape:
            raise InputError(f"{key} is {shape} and would become {tuple(tensor.shape)}; its layout is not known")
        return as_stored.to(self.naming.headers[key].dtype).contiguous()

    def _converted(self, converter: Any, tensors: Mapping[str, Tensor]) -> Tensors:
        converter, target = deepcopy(converter), ""
        with _loud():
            try:
                for name, tensor in tensors.items():
                    target, pattern = rename_source_key(name, [], [converter])
                    converter.add_tensor(target, name, pattern, tensor)
                made = converter.convert(target, model=self.naming.network, config=self.naming.network.config)
            except Exception as error:  # every operation fails in a way of its own
                lacking = gap(self.renamed.values())
                raise self._unfit(f"{lacking} is missing" if lacking else first_line(error)) from error
        return {name: x[0] if isinstance(x, list) else x for name, x in made.items()}

    def _unfit(self, why: str) -> InputError:
        return InputError(
            f"{self.keys[0]} and its like do not fit together ({why}); the checkpoint is incomplete, or its config "
            "names another architecture"
        )

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if name in self.naming.own and shape != tuple(self.naming.own[name].shape):
                configured = tuple(self.naming.own[name].shape)
                raise InputError(
                    f"{name} is {configured} by the config, and {self.keys[0]} and its like make {shape} of it; "
                    "the checkpoint is incomplete, or its config is another's"
                )


def gap(names: Iterable[str]) -> str | None:
    """The first name that is missing where every kind of name should come with the same numbers."""
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        kinds.setdefault(NUMBERS.sub("{}", name), set()).add(tuple(NUMBERS.findall(name)))
    every = set().union(*kinds.values())
    return next((kind.format(*one) for kind, own in kinds.items() for one in sorted(every - own)), None)


@contextmanager
def _loud() -> Iterator[None]:
    """While open, transformers does not write about conversions that fail: they are told as errors."""
    logger = logging.getLogger("transformers.core_model_loading")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Naming:
    """What transformers knows of one network's names."""

    def __init__(self, network: PreTrainedModel, headers: Mapping[str, Header]) -> None:
        mapping = get_model_conversion_mapping(network)
        self.network, self.headers, self.own = network, headers, network.state_dict()
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def final(self, name: str) -> str:
        """A parameter's whole name: with the base model's prefix, or without it."""
        return str(rename_source_key(name, [], [], self.network.base_model_prefix, self.own)[0])

    def parts(self) -> Iterator[Part]:
        fused: dict[str, dict[str, str]] = {}
        chosen: dict[str, Any] = {}
        for key in sorted(self.headers, key=dot_natural_key):  # experts are stacked in the order of their numbers
            renamed, _ = rename_source_key(key, self.renamings, [])
            found = ((entry, *rename_source_key(renamed, [], [entry])) for entry in self.converters)
            converter, target, _ = next((one for one in found if one[2] is not None), (None, renamed, None))
            if converter is None:
                yield Plain(key, self.final(renamed))
            else:
                fused.setdefault(target, {})[key] = renamed
                chosen[target] = converter
        for target, renamed_keys in fused.items():
            yield Fused(self, chosen[target], renamed_keys)


@dataclass(frozen=True)
class Names:
    """How the tensors of a checkpoint, or of a part of it, become parameters."""

    parts: Sequence[Part]

    @cached_property
    def keys(self) -> list[str]:
        return [key for part in self.parts for key in part.keys]

    @cached_property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """{parameter's name: the keys that make it}; a tensor without a place in the network has its own name."""
        return {name: part.keys for part in self.parts for name in part.names}

    def inside(self, prefix: str) -> Names:
        """Of one module alone."""
        return Names([part for part in self.parts if part.names[0].startswith(f"{prefix}.")])

    def stored_as(self, keys: Iterable[str]) -> Names:
        """Of these tensors alone."""
        wanted = set(keys)
        return Names([part for part in self.parts if not wanted.isdisjoint(part.keys)])

    def making(self, names: Iterable[str]) -> Names:
        """Of these parameters alone (and of what is stored in one with them)."""
        wanted = set(names)
        return Names([part for part in self.parts if not wanted.isdisjoint(part.names)])

    def join(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """{key: tensor} -> {name: parameter}. Raises InputError where they do not fit together."""
        return {name: tensor for part in self.parts for name, tensor in part.join(tensors).items()}


def names_of(network: PreTrainedModel, headers: Mapping[str, Header]) -> Names:
    """How the tensors of a checkpoint become the parameters of a network. Raises InputError where they cannot."""
    return Names(list(_Naming(network, headers).parts()))
