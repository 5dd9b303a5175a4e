"""A sparse model that stays sparse while it is trained, whatever trains it.

    with obsprune.keep_sparse(model):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

What is held: each parameter of two or more dimensions in which some numbers, and not all, are zero. (Vectors are never
pruned; a matrix of zeros alone is a beginning, such as LoRA's B, which must be able to move.)

Why three things are masked, each where the one before cannot reach:

- Weights, after every step of every torch optimizer. This alone is the promise. Weight decay leaves a zero what it is;
  momentum from before, noise, or a float32 copy that is rounded into the weight do not.
- Gradients, as soon as they are accumulated. Clipping then sees the norm of what is trained, and means, momentum and
  float32 copies begin as zeros and stay it, wherever an optimizer hides them. DDP reduces what this hook leaves; FSDP2
  calls it on the reduced shard.
- An optimizer's own state of the weight's shape, after every step: what was there before, or was loaded.

A mask takes a byte a weight. Under FSDP2 each process holds the part that belongs to its shard.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from obsprune.errors import InputError, ObspruneError

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes. As integers numbers of every kind, NaN too, are zero after a product with zero, and it is several times
faster than masked_fill.
"""
HIDDEN = ("FullyShardedDataParallel",)
"""Wrappers that flatten weights into vectors."""


@final
@dataclass(frozen=True)
class Zeros:
    """Where weights are zero. masks: {parameter's name: (the parameter, its shard's keep mask: False = zero)}."""

    masks: dict[str, tuple[nn.Parameter, Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, skip: Collection[str]) -> Zeros:
        """Raises InputError when there is nothing to hold."""
        chosen = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and parameter.is_floating_point() and not any(re.search(one, name) for one in skip)
        }
        masks = {name: (p, _local(p) != 0) for name, p in chosen.items() if 0 < _nonzero(p) < p.numel()}
        if not masks:
            raise InputError(f"none of the {len(chosen)} matrices of this model has zeros to keep{_reason(model)}")
        return cls(masks)

    @torch.no_grad()
    def restore(self, frozen: bool = False) -> None:
        """Zeros the weights that were zero, NaN or not; those that are not trained only if asked to."""
        for parameter, keep in self.masks.values():
            if frozen or parameter.requires_grad:
                _mask(_local(parameter), keep)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """As `restore`, and of an optimizer everything it holds in the shape of a weight."""
        self.restore()
        for parameter, keep in self.masks.values():
            held = [_local(x) for x in optimizer.state.get(parameter, {}).values() if isinstance(x, Tensor)]
            for tensor in held:
                if tensor.shape == keep.shape and tensor.is_floating_point():  # 8-bit states are codes: 0 is a number
                    _mask(tensor, keep)

    def require_same(self, model: nn.Module) -> None:
        """Raises ObspruneError when the model has other parameters now: those were not held."""
        there = {id(parameter) for parameter in model.parameters()}
        gone = [name for name, (parameter, _) in self.masks.items() if id(parameter) not in there]
        if gone:
            raise ObspruneError(
                f"{gone[0]} and {len(gone) - 1} others were replaced while their zeros were kept; enter keep_sparse "
                "after the model is wrapped (fully_shard, accelerator.prepare)"
            )


@contextmanager
def keep_sparse(model: nn.Module, skip: Collection[str] = ()) -> Iterator[Zeros]:
    """While open, and when it closes, weights of the model that are zero now are exactly zero after every optimizer
    step; their gradients are zero, too.

    Enter it when the model is where it will be trained, and wrapped (DDP, FSDP2, accelerate). Weights that are not
    trained are zeroed again when it closes: LoRA adapters can be merged inside. skip: regular expressions of the names
    of parameters that may become dense.

    Gives the Zeros; call their `restore` after what no torch optimizer does. Raises InputError when nothing is zero;
    ObspruneError, at the end, when the parameters are not the model's any more.
    """
    zeros = Zeros.of(model, skip)
    with ExitStack() as hooks:
        hooks.callback(zeros.restore, frozen=True)
        for parameter, keep in zeros.masks.values():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(partial(_mask_gradient, keep))  # type: ignore[no-untyped-call]
                hooks.callback(hook.remove)
        hooks.callback(register_optimizer_step_post_hook(zeros.after_step).remove)
        yield zeros
    zeros.require_same(model)


@torch.no_grad()
def _mask_gradient(keep: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not None:
        _mask(_local(parameter.grad), keep)


def _mask(tensor: Tensor, keep: Tensor) -> None:
    tensor.view(BITS[tensor.itemsize]).mul_(keep)


def _local(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor (DTensor) that lies here; any other one itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local else tensor


def _nonzero(tensor: Tensor) -> int:
    """How many numbers are not zero, on all processes together."""
    count = (tensor != 0).sum()
    whole = getattr(count, "full_tensor", None)
    return int(whole() if whole else count)


def _reason(model: nn.Module) -> str:
    wrapped = any(type(module).__name__ in HIDDEN for module in model.modules())
    return ": FSDP's first version flattens them; use its second (fully_shard, fsdp_version 2)" if wrapped else ""
