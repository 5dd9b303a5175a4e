"""Where a layer's output enters the residual stream, found by numbers alone: no family is known here.

A little noise is added to the output o of one layer. The first tensor T behind it, among all that enter or leave a
submodule, that moves by s times the noise and holds something besides o is the stream right after the addition:
T = h + s·o, with h the stream just before. Tried on 24 architectures, parallel blocks and scaled residuals among them.
Legend: o_TR the layer's output, n_TR the noise, s_R the scale of each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from obsprune.models.experts import inside_experts
from obsprune.models.matrices import Matrix, Sink

TOKENS = 64
"""How many tokens of a call are compared."""
TOLERANCE, ROUNDING = 1e-4, 1e-6
Tap = Callable[[nn.Module, bool, int, Tensor], None]
"""(module, whether the tensor enters it, its place among the tensors that do, the tensor)"""


@dataclass(frozen=True)
class Junction:
    """T: the `index`-th tensor that enters (or leaves) `module`, its channels where `layout` says; scale_R: how they
    hold the layer's output.
    """

    module: nn.Module
    entering: bool
    index: int
    layout: int
    scale_R: Tensor

    def apart(self) -> Junction:
        """For another process."""
        return replace(self, module=nn.Identity(), scale_R=self.scale_R.cpu())

    def at(self, module: nn.Module, device: torch.device) -> Junction:
        """The same place of this process's network."""
        return replace(self, module=module, scale_R=self.scale_R.to(device))


@dataclass(frozen=True)
class _Seen:
    """One tensor as it passed: where, of how many numbers, and copies of its first tokens [TOKENS, channels], in every
    layout it can have.
    """

    module: nn.Module
    entering: bool
    index: int
    size: int
    values: list[Tensor]


def find_junctions(
    block: nn.Module, matrices: list[Matrix], call: tuple[tuple[Any, ...], Mapping[str, Any]]
) -> dict[Matrix, Junction]:
    """The junction of every matrix that writes to the residual stream; the others are left out.

    call: (args, kwargs) of the block for one batch. Computed in float32; costs as many forwards as matrices, and one.
    """
    args, kwargs = tree_map_only(Tensor, lambda x: x.detach().float() if x.is_floating_point() else x, call)

    def run() -> list[_Seen]:
        seen: list[_Seen] = []
        with torch.no_grad(), _tapped(block, lambda *what: seen.append(_note(*what))):
            output = block.forward(*args, **kwargs)
        return [*seen, *(_note(block, False, index, x) for index, x in enumerate(_floats(output)))]

    with _in_float32(block):
        plain = run()
        whole = [matrix for matrix in matrices if matrix.rows == slice(None)]  # a part of a layer writes no stream
        found = {matrix: _junction(matrix, plain, run) for matrix in whole}
    return {matrix: junction for matrix, junction in found.items() if junction}


def _junction(matrix: Matrix, plain: list[_Seen], run: Callable[[], list[_Seen]]) -> Junction | None:
    start = next(i for i, seen in enumerate(plain) if seen.module is matrix.module and not seen.entering)
    found: list[Tensor] = []

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(0)
        o_TR = matrix.outputs(output)[:TOKENS]
        noise = torch.randn(output.shape, generator=random).to(output) * o_TR.std()
        found[:] = [o_TR.clone(), matrix.outputs(noise)[:TOKENS]]
        return output + noise

    handle = matrix.module.register_forward_hook(disturb)
    try:
        moved = run()
    finally:
        handle.remove()
    o_TR, n_TR = found
    for before, after in zip(plain[start + 1 :], moved[start + 1 :], strict=True):
        for layout, (T_TR, moved_TR) in enumerate(zip(before.values, after.values, strict=True)):
            if before.size == plain[start].size and T_TR.shape == o_TR.shape:
                scale_R = _scale(T_TR, moved_TR, n_TR, o_TR)
                if scale_R is not None:
                    return Junction(before.module, before.entering, before.index, layout, scale_R)
    return None


def _scale(T_TR: Tensor, moved_TR: Tensor, n_TR: Tensor, o_TR: Tensor) -> Tensor | None:
    """s_R when T moved by s·n and T − s·o is more than a constant for each channel; else None."""
    difference_TR = moved_TR - T_TR
    scale_R = (difference_TR * n_TR).sum(0) / n_TR.square().sum(0)
    most, largest = float(difference_TR.abs().max()), float(T_TR.abs().max())
    error = float((difference_TR - scale_R * n_TR).abs().max())
    if most == 0 or error > TOLERANCE * most + ROUNDING * largest:
        return None
    rest_TR = T_TR - scale_R * o_TR
    constant = float((rest_TR - rest_TR[:1]).abs().max()) <= TOLERANCE * largest
    return None if constant or bool((scale_R == 0).any()) else scale_R


def _note(module: nn.Module, entering: bool, index: int, x: Tensor) -> _Seen:
    return _Seen(module, entering, index, x.numel(), [tokens[:TOKENS].clone() for tokens in _layouts(x)])


def _layouts(x: Tensor) -> list[Tensor]:
    """The tensor as [T, channels]: with the channels in the last dimension, and, where they can be, in the second."""
    last = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
    return [last, x.movedim(1, -1).reshape(-1, x.shape[1])] if x.dim() == 4 else [last]


def _floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def _tapped(block: nn.Module, tap: Tap) -> Iterator[None]:
    """While open, `tap` sees every tensor that enters or leaves a submodule, in order of time."""

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, x in enumerate(_floats((args, kwargs))):
            tap(module, True, index, x)

    def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for index, x in enumerate(_floats(output)):
            tap(module, False, index, x)

    with ExitStack() as hooks:
        apart = inside_experts(block)  # noise changes how often they are called
        for module in [module for module in list(block.modules())[1:] if module not in apart]:
            hooks.callback(module.register_forward_pre_hook(entering, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leaving).remove)
        yield


@contextmanager
def watched(block: nn.Module, junctions: Mapping[Matrix, Junction], sink: Sink) -> Iterator[Callable[[Any], None]]:
    """While open, whenever the block runs, `sink` is given h/s [T, R] of each matrix, float32: the stream just before
    its output, in units of that output. The value must be called with what the block returned.
    """
    outputs: dict[Matrix, Tensor] = {}

    def tap(module: nn.Module, entering: bool, index: int, x: Tensor) -> None:
        for matrix, junction in junctions.items():
            place = junction.module, junction.entering, junction.index
            if module is matrix.module and not entering:
                outputs[matrix] = matrix.outputs(x).to(torch.float32, copy=True)  # Falcon adds to it in place
            elif (module, entering, index) == place and matrix in outputs:
                sink(matrix, _layouts(x)[junction.layout].float() / junction.scale_R - outputs.pop(matrix))

    def returned(output: Any) -> None:
        for index, x in enumerate(_floats(output)):
            tap(block, False, index, x)

    with _tapped(block, tap):
        yield returned


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """While open, all weights and buffers of the block are float32."""
    tensors = [*block.parameters(), *block.buffers()]
    own = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
    try:
        yield
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data
