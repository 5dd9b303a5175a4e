"""The reverse walk: the gradient of a loss with respect to all blocks, with the graph of one block alive at a time.

Forward, the autograd graph is cut at every block and only what the model does between its blocks is recorded. Backward,
each block is run again with its inputs as they were, and its gradient is handed to the glue before it. Equal to
autograd through the whole model bit for bit; kept in memory are the blocks' inputs (gradient checkpointing by block),
and a block needs to be loaded only for its two visits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from obsprune.errors import WalkMismatch
from obsprune.models.walk import Stop, Walk

Visit = Callable[[Callable[[], None]], None]
"""Called once a batch with what runs the block on it, forward and backward: afterwards the block's parameters that
require a gradient have it in `.grad`, added to what was there."""
DEPTH = 3
"""How deep an opaque argument is searched for tensors."""


@dataclass(frozen=True)
class _Crossing:
    """One batch at one block: the call's leaves and their structure, and the block's outputs as leaves of the glue."""

    arguments: list[Any]
    structure: Any
    outputs: list[Tensor]


def backward_of(loss: Callable[[int, Any], Tensor]) -> Callable[[int, Any], None]:
    """For a recording Walk's `finish`: differentiates loss(batch's key, the model's own output)."""

    def finish(key: int, output: Any) -> None:
        with torch.enable_grad():
            torch.autograd.backward([loss(key, output)])

    return finish


def reverse_walk(
    walk: Walk,
    forward_at: Callable[[int], AbstractContextManager[Any]],
    backward_at: Callable[[int], AbstractContextManager[Visit]],
) -> None:
    """Visits every block twice: forward inside `forward_at(index)`, then, from the last to the first, inside
    `backward_at(index)`, whose value is called once for every batch. A block's weights must be the same on both visits.

    walk: recording, with `backward_of` a loss as its `finish`. Raises WalkMismatch for blocks that pass tensors on in a
    way that gradients cannot follow.
    """
    tape: dict[int, dict[int, _Crossing]] = {}
    with walk:
        for stop in walk:
            with forward_at(stop.index):
                tape[stop.index] = {}
                for key in stop.keys:
                    tape[stop.index][key], output = _cross(stop, key, walk.network)
                    stop.leave(key, output)
    for index in reversed(list(tape)):
        crossings = tape.pop(index)
        with backward_at(index) as visit:
            for key in list(crossings):
                visit(partial(_rerun, walk.blocks[index], crossings.pop(key)))


def _cross(stop: Stop, key: int, network: nn.Module) -> tuple[_Crossing, Any]:
    """Runs the block without a graph; returns what its way back needs, and its output cut off as new leaves."""
    arguments, structure = tree_flatten(stop.call(key))
    before = _hidden(arguments)
    raw = stop.run(key)
    if _hidden(arguments) != before:
        raise WalkMismatch(
            f"the blocks of a {type(network).__name__} hand tensors on beside their outputs (shared keys and values), "
            "where gradients cannot follow; only --iters 1 works for it"
        )
    output = tree_map_only(Tensor, _leaf, raw)
    return _Crossing(arguments, structure, _floats(output)), output


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _rerun(block: nn.Module, crossing: _Crossing) -> None:
    """The block once more, with a graph; backward through it, then through the glue onto the outputs before it."""
    inputs = [_leaf(x) if isinstance(x, Tensor) and x.requires_grad else x for x in crossing.arguments]
    args, kwargs = tree_unflatten(inputs, crossing.structure)
    with torch.enable_grad():
        again = _floats(block.forward(*args, **kwargs))
    pairs = [(y, o.grad) for y, o in zip(again, crossing.outputs, strict=True) if o.grad is not None]
    pairs = [(y, gradient) for y, gradient in pairs if y.requires_grad]
    _backward(pairs)
    _backward(
        [
            (x, mine.grad)
            for x, mine in zip(crossing.arguments, inputs, strict=True)
            if mine is not x and mine.grad is not None
        ]
    )


def _backward(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])


def _hidden(leaves: Sequence[Any]) -> set[tuple[int, int]]:
    """Tensors inside opaque arguments, by identity and version: what a block could change behind the walk's back."""
    return {mark for leaf in leaves if not isinstance(leaf, Tensor) for mark in _inside(leaf, DEPTH)}


def _inside(value: Any, depth: int) -> set[tuple[int, int]]:
    if isinstance(value, Tensor):
        return {(id(value), value._version)}
    if depth == 0 or isinstance(value, (nn.Module, torch.dtype, torch.device, type)):
        return set()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    own = vars(value).values() if hasattr(value, "__dict__") else ()
    return {mark for part in (*parts, *own) for mark in _inside(part, depth - 1)}
