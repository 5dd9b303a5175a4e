"""What is pruned: the weight of one layer, seen as a matrix [R, C] whatever the layer calls its dimensions.

The only place in the project that asks what kind a layer is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from obsprune.errors import InputError

Sink = Callable[["Matrix", Tensor], None]
"""Called before the layer runs, with the tensor that enters it (valid until the layer's block is done)."""


class Matrix(ABC):
    """One prunable weight. `name` is the module's full name; `stored` the dtype it has in the checkpoint."""

    def __init__(self, name: str, module: nn.Module, stored: torch.dtype) -> None:
        self.name, self.module, self.stored = name, module, stored

    @property
    def parameter(self) -> str:
        """Full name of the parameter that holds the weight."""
        return f"{self.name}.weight"

    @property
    def weight(self) -> Tensor:
        """The layer's own tensor, in the layer's layout."""
        return self.tensor.data

    @property
    def tensor(self) -> nn.Parameter:
        """The layer's own parameter."""
        return self.module.get_parameter("weight")

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's bias, where the architecture has one."""
        return getattr(self.module, "bias", None)

    @property
    def device(self) -> torch.device:
        """Where the weight is now."""
        return self.weight.device

    @property
    def shape(self) -> tuple[int, int]:
        """(R outputs, C inputs)."""
        rows, columns = self.turn(self.weight).shape
        return rows, columns

    def read(self) -> Tensor:
        """The weight [R, C] in the stored dtype."""
        return self.turn(self.weight).contiguous().to(self.stored)

    def write(self, weight_RC: Tensor) -> None:
        """Puts a weight [R, C] into the layer, in the layer's compute dtype."""
        self.weight.copy_(self.turn(weight_RC))

    def take_gradient(self) -> Tensor:
        """The gradient [R, C] that backward has left in the layer, in float32; it is gone from there afterwards."""
        parameter = self.tensor
        if parameter.grad is None:
            raise InputError(f"no gradient reaches {self.name}; leave it dense with --skip '{self.name}'")
        gradient, parameter.grad = parameter.grad, None
        return self.turn(gradient).float()

    @abstractmethod
    def turn(self, weight: Tensor) -> Tensor:
        """From the layer's layout to [R, C]; the same way leads back."""

    @abstractmethod
    def tokens(self, inputs: Tensor) -> Tensor:
        """What enters the matrix [T, C], given what entered the layer."""

    @contextmanager
    def observed(self, sink: Sink) -> Iterator[None]:
        """While open, `sink` sees every input of the layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sink(self, args[0] if args else next(iter(kwargs.values())))

        handle = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@final
class LinearMatrix(Matrix):
    """nn.Linear: weight [out, in], as it is."""

    def turn(self, weight: Tensor) -> Tensor:
        return weight

    def tokens(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(-1, inputs.shape[-1])


@final
class Conv1DMatrix(Matrix):
    """GPT-2's Conv1D: a linear layer that stores its weight as [in, out]."""

    def turn(self, weight: Tensor) -> Tensor:
        return weight.T

    def tokens(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(-1, inputs.shape[-1])


KINDS: dict[type[nn.Module], type[Matrix]] = {nn.Linear: LinearMatrix, Conv1D: Conv1DMatrix}


def find_matrices(prefix: str, block: nn.Module, stored: Callable[[str], torch.dtype]) -> list[Matrix]:
    """The prunable layers of a block, in module order. `stored` tells the checkpoint's dtype of a parameter name."""
    found: list[Matrix] = []
    for name, module in block.named_modules(prefix=prefix):
        for kind, matrix in KINDS.items():
            if isinstance(module, kind):
                found.append(matrix(name, module, stored(f"{name}.weight")))
    return found


def fused_experts(block: nn.Module) -> list[str]:
    """Names of parameters with three or more dimensions that no convolution owns: the experts of a mixture."""
    return [
        f"{name}.{own}" if name else own
        for name, module in block.named_modules()
        if not isinstance(module, _ConvNd)
        for own, parameter in module.named_parameters(recurse=False)
        if sum(size > 1 for size in parameter.shape) >= 3
    ]


@contextmanager
def exchanged(tensors: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """While open, these parameters have other values; nothing is copied."""
    own = {parameter: parameter.data for parameter in tensors}
    for parameter, tensor in tensors.items():
        parameter.data = tensor
    try:
        yield
    finally:
        for parameter, tensor in own.items():
            parameter.data = tensor


@contextmanager
def differentiated(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """While open, backward leaves gradients in these parameters."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def observed(matrices: list[Matrix], sink: Sink) -> Iterator[None]:
    """While open, `sink` sees every input of every one of the matrices."""
    with ExitStack() as stack:
        for matrix in matrices:
            stack.enter_context(matrix.observed(sink))
        yield
