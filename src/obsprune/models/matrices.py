"""What is pruned: the weight of one layer, seen as a matrix [R, C] whatever the layer calls its dimensions.

The only place in the project that asks what kind a layer is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from obsprune.errors import InputError

Sink = Callable[["Matrix", Tensor], None]
"""Called before the layer runs, with the tensor that enters it (valid until the layer's block is done)."""
UNFOLDED_BYTES = 2**26
"""The columns of a convolution are laid out for so many images at a time that they stay under this, in float32."""


class Matrix(ABC):
    """One prunable weight. `layer` is the module's full name, `name` the matrix's own (a convolution in groups has
    several); `stored` the dtype it has in the checkpoint.
    """

    def __init__(self, layer: str, module: nn.Module, stored: torch.dtype) -> None:
        self.name, self.layer, self.module, self.stored = layer, layer, module, stored

    @property
    def whole(self) -> str:
        """What a person calls it: the layer, whose matrices are chosen together."""
        return self.layer

    @property
    def alike(self) -> str:
        """The name in lists that are for people: one for all experts of a layer."""
        return self.name

    @property
    def parameter(self) -> str:
        """Full name of the parameter that holds the weight."""
        return f"{self.layer}.weight"

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
    def bias_parameter(self) -> str:
        """Full name of the parameter that holds the bias, where there is one."""
        return f"{self.layer}.bias"

    @property
    def rows(self) -> slice | tuple[int, slice]:
        """Which of the layer's outputs are the matrix's: where its own are in the bias."""
        return slice(None)

    @property
    def device(self) -> torch.device:
        """Where the weight is now."""
        return self.weight.device

    @property
    def shape(self) -> tuple[int, int]:
        """(R outputs, C inputs)."""
        rows, columns = self.turn(self.weight).shape
        return rows, columns

    @property
    def depthwise(self) -> bool:
        """Whether every channel has a filter of its own, too small to prune as a rule."""
        return False

    @property
    def starved(self) -> bool:
        """Whether it belongs to an expert that too few calibration tokens are sent to."""
        return False

    @property
    def geometry(self) -> Hashable:
        """How the layer looks at its input: two matrices share a Gram when input and geometry are the same."""
        return None

    def read(self) -> Tensor:
        """The weight [R, C] in the stored dtype."""
        return self.turn(self.weight).contiguous().to(self.stored)

    def write(self, weight_RC: Tensor) -> None:
        """Puts a weight [R, C] into the layer, in the layer's compute dtype."""
        self.turn(self.weight).copy_(weight_RC)

    def gradient(self) -> Tensor:
        """The gradient [R, C] that backward has left in the layer, in float32."""
        gradient = self.tensor.grad
        if gradient is None:
            raise InputError(f"no gradient reaches {self.name}; leave it dense with --skip '{self.layer}'")
        return self.turn(gradient).float()

    @abstractmethod
    def turn(self, weight: Tensor) -> Tensor:
        """A view [R, C] of a tensor in the layer's layout."""

    @abstractmethod
    def tokens(self, inputs: Tensor) -> Iterator[Tensor]:
        """What enters the matrix, given what entered the layer: x_TC, in one piece or several."""

    @abstractmethod
    def outputs(self, outputs: Tensor) -> Tensor:
        """What leaves the layer as [T, R], tokens in the same order."""

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


class LinearLike(Matrix):
    """A layer that acts on the last dimension."""

    def tokens(self, inputs: Tensor) -> Iterator[Tensor]:
        yield inputs.reshape(-1, inputs.shape[-1])

    def outputs(self, outputs: Tensor) -> Tensor:
        return outputs.reshape(-1, outputs.shape[-1])


@final
class LinearMatrix(LinearLike):
    """nn.Linear: weight [out, in], as it is."""

    def turn(self, weight: Tensor) -> Tensor:
        return weight


@final
class Conv1DMatrix(LinearLike):
    """GPT-2's Conv1D: a linear layer that stores its weight as [in, out]."""

    def turn(self, weight: Tensor) -> Tensor:
        return weight.T


@final
class ConvMatrix(Matrix):
    """One group of nn.Conv2d, weight [out, in, kh, kw]: a matrix over the patches of its input channels (im2col)."""

    module: nn.Conv2d

    def __init__(self, layer: str, module: nn.Conv2d, stored: torch.dtype, group: int) -> None:
        super().__init__(layer, module, stored)
        self.group = group
        if module.groups > 1:
            self.name = f"{layer}[{group}]"

    @property
    def rows(self) -> slice:
        each = self.module.out_channels // self.module.groups
        return slice(self.group * each, (self.group + 1) * each) if self.module.groups > 1 else slice(None)

    @property
    def depthwise(self) -> bool:
        return self.module.groups == self.module.in_channels > 1

    @property
    def geometry(self) -> Hashable:
        conv = self.module
        return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode, conv.groups, self.group

    def turn(self, weight: Tensor) -> Tensor:
        return weight[self.rows].flatten(1)

    def tokens(self, inputs: Tensor) -> Iterator[Tensor]:
        """One row for each place of each image, some images at a time."""
        conv = self.module
        each = conv.in_channels // conv.groups
        channels = inputs[:, self.group * each : (self.group + 1) * each]
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = functional.pad(channels, conv._reversed_padding_repeated_twice, mode)
        patches = padded
        for dimension in (0, 1):  # a view [B, C, h, w, kh, kw]: nothing is copied yet
            reach = (conv.kernel_size[dimension] - 1) * conv.dilation[dimension] + 1
            patches = patches.unfold(2 + dimension, reach, conv.stride[dimension])[..., :: conv.dilation[dimension]]
        rows = patches.permute(0, 2, 3, 1, 4, 5)
        of_an_image = 4 * rows[:1].numel()
        for part in torch.split(rows, max(1, UNFOLDED_BYTES // max(of_an_image, 1))):
            yield part.reshape(-1, rows.shape[3:].numel())

    def outputs(self, outputs: Tensor) -> Tensor:
        return outputs[:, self.rows].movedim(1, -1).flatten(0, -2)


def _linear(layer: str, module: nn.Module, stored: torch.dtype) -> list[Matrix]:
    return [LinearMatrix(layer, module, stored)]


def _conv1d(layer: str, module: nn.Module, stored: torch.dtype) -> list[Matrix]:
    return [Conv1DMatrix(layer, module, stored)]


def _conv(layer: str, module: nn.Module, stored: torch.dtype) -> list[Matrix]:
    """None for a class with a forward of its own: BiT's standardises the weight there, and a zero does not stay one."""
    assert isinstance(module, nn.Conv2d)
    if type(module).forward is not nn.Conv2d.forward:
        return []
    return [ConvMatrix(layer, module, stored, group) for group in range(module.groups)]


KINDS: dict[type[nn.Module], Callable[[str, nn.Module, torch.dtype], list[Matrix]]] = {
    nn.Linear: _linear,
    Conv1D: _conv1d,
    nn.Conv2d: _conv,
}


def find_matrices(prefix: str, block: nn.Module, stored: Callable[[str], torch.dtype]) -> list[Matrix]:
    """The prunable layers of a block, in module order. `stored` tells the checkpoint's dtype of a parameter name."""
    found: list[Matrix] = []
    for name, module in block.named_modules(prefix=prefix):
        for kind, make in KINDS.items():
            if isinstance(module, kind):
                found += make(name, module, stored(f"{name}.weight"))
    return found


def linears(network: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are nn.Linear and compute as it does, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    }


def fused_parameters(prefix: str, block: nn.Module) -> list[str]:
    """Names of parameters with three or more dimensions that no convolution owns."""
    return [
        f"{name}.{own}" if name else own
        for name, module in block.named_modules(prefix=prefix)
        if not isinstance(module, _ConvNd)
        for own, parameter in module.named_parameters(recurse=False)
        if sum(size > 1 for size in parameter.shape) >= 3
    ]


def flat_experts(prefix: str, block: nn.Module, known: Collection[str]) -> list[str]:
    """Names of weights of two dimensions that no layer owns, inside a module called experts that is not `known`."""
    return [
        f"{name}.{own}"
        for name, module in block.named_modules(prefix=prefix)
        if "experts" in name.removeprefix(prefix).split(".") and not name.startswith(tuple(known))
        if not isinstance(module, tuple(KINDS))
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]


def take_gradients(matrices: Collection[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
    """The gradients [R, C] that backward has left, float32; they are gone from the layers afterwards."""
    for matrix in matrices:
        yield matrix, matrix.gradient()
    for matrix in matrices:
        matrix.tensor.grad = None  # once all are taken: several may share one parameter


def copies(matrices: Collection[Matrix]) -> dict[nn.Parameter, Tensor]:
    """Of the weights and biases of matrices, by parameter."""
    both = [parameter for matrix in matrices for parameter in (matrix.tensor, matrix.bias) if parameter is not None]
    return {parameter: parameter.data.clone() for parameter in dict.fromkeys(both)}


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
