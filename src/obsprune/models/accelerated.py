"""A whole network that is trained, as transformers loads it, with accelerate around it: mixed precision, and several
processes that each hold all of it (DDP).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from obsprune.errors import InputError, first_line
from obsprune.models.load import Model
from obsprune.models.ready import without_bars

WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Ways to share work in which each process holds the whole network."""


def trainable(model: Model, checkpointing: bool) -> Any:
    """The network of a checkpoint as from_pretrained gives it, in float32 on the model's device, in training mode.

    checkpointing: activations are computed twice instead of kept. Raises InputError where a network cannot do that.
    """
    auto, remote = model.kind.auto, model.trust_remote_code
    with without_bars():
        network = auto.from_pretrained(model.directory, dtype=torch.float32, trust_remote_code=remote)
    network.config.use_cache = network.config.get_text_config().use_cache = False
    if checkpointing:
        try:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise InputError(f"no gradient checkpointing here: {first_line(error)}; drop the flag") from error
    return network.to(model.device).train()


@final
@dataclass(frozen=True)
class Accelerated:
    """A network in training. network: itself; wrapped: what is called; optimizer: of its parameters."""

    accelerator: Accelerator
    network: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer

    def part(self, last: bool) -> AbstractContextManager[Any]:
        """A context for one forward and backward of a step: gradients are shared at the last one alone."""
        alone: AbstractContextManager[Any] = self.accelerator.no_sync(self.wrapped)
        return nullcontext() if last else alone

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, which is averaged over the processes."""
        self.accelerator.backward(loss)

    def update(self, rate: float, longest: float) -> None:
        """One step of the optimizer by what gradients there are, none longer than `longest` all together."""
        self.accelerator.clip_grad_norm_(self.parameters, longest)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return list(self.named.values())

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The same by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def autocast(self) -> AbstractContextManager[Any]:
        """While open, forwards are as in training."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context


@contextmanager
def accelerated(model: Model, network: nn.Module, compute: torch.dtype, decay: float) -> Iterator[Accelerated]:
    """A network with AdamW (Loshchilov & Hutter 2019) and accelerate. compute: of the forwards; decay: of weights.

    Raises InputError where a launcher wants the network split among the processes.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # of another run in this process: it binds all later ones
    precision = "bf16" if compute == torch.bfloat16 else "no"
    accelerator = Accelerator(cpu=model.device.type == "cpu", mixed_precision=precision, gradient_accumulation_steps=1)
    if accelerator.distributed_type not in WHOLE:
        raise InputError(
            f"{accelerator.distributed_type.value} splits a network among the processes, and finetune does not; start "
            "with torchrun, or use obsprune.keep_sparse in a loop of your own"
        )
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=decay)
    wrapped = accelerator.prepare_model(network, device_placement=False)
    try:
        yield Accelerated(accelerator, network, wrapped, optimizer)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
