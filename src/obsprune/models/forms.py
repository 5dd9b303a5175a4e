"""Ways to hold and multiply a network's weights in which zeros are left out, for inference. One value for each."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from obsprune.errors import InputError
from obsprune.models.csr import CsrLinear, require_csr
from obsprune.models.matrices import linears
from obsprune.models.semi_structured import to_semi_structured

CSR_FROM = 0.8
"""The share of zeros from which CSR is tried; below, it gains little or loses (docs/inference.md)."""


@final
@dataclass(frozen=True)
class Formed:
    """A network, and how many of its Linear layers are in a form that leaves zeros out."""

    network: Any
    layers: int = 0


class Form(ABC):
    """name: what a person calls it."""

    name: str

    @abstractmethod
    def of(self, network: nn.Module) -> Formed:
        """A network in this form; the one given stays as it is, and shares what is the same in both.

        Raises InputError where there is none: what is missing, of the machine or of the network.
        """


@final
@dataclass(frozen=True)
class Csr(Form):
    """CSR with indices of 32 bits, on CPUs, for the Linear layers of which at least this share is zero."""

    least: float = CSR_FROM
    name = "CSR"

    def of(self, network: nn.Module) -> Formed:
        layers = linears(network)
        for layer in layers.values():
            require_csr(layer.weight)
        shares = {name: _zeros(layer.weight) for name, layer in layers.items()}
        chosen = [name for name, share in shares.items() if share >= self.least]
        if not chosen:
            most = f"; the sparsest has {max(shares.values()):.1%}" if shares else ""
            raise InputError(f"none of the {len(layers)} Linear layers has {self.least:.0%} zeros{most}")
        other = twin(network)
        for name in chosen:
            other.set_submodule(name, CsrLinear.of(layers[name]))
        return Formed(other, len(chosen))


@final
@dataclass(frozen=True)
class SemiStructured(Form):
    """2:4 on CUDA (models/semi_structured.py)."""

    name: str = "semi-structured"

    def of(self, network: nn.Module) -> Formed:
        made = to_semi_structured(twin(network))
        return Formed(made, sum(is_traceable_wrapper_subclass(layer.weight) for layer in linears(made).values()))


def twin(network: nn.Module) -> nn.Module:
    """Other modules with the same tensors: what is replaced in one stays in the other."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all parameters as they are held, each counted once."""
    return sum(part.nbytes for parameter in network.parameters() for part in _parts(parameter))


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that one consists of."""
    if tensor.layout == torch.sparse_csr:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif is_traceable_wrapper_subclass(tensor):
        yield from (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    else:
        yield tensor


def _zeros(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
