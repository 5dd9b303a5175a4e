"""Blocks: the repeated layers a model is made of, found without knowing the family, and loaded one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from obsprune.errors import InputError
from obsprune.models.checkpoint import Checkpoint, read_tensors
from obsprune.models.matrices import Matrix


@final
class Block:
    """One block: on the meta device until `loaded`, on it again afterwards.

    keys: {checkpoint key: parameter name inside the block, or None when the block has no place for it}.
    """

    def __init__(self, name: str, module: nn.Module, checkpoint: Checkpoint, keys: Mapping[str, str | None]) -> None:
        self.name, self.module, self.checkpoint, self.keys = name, module, checkpoint, dict(keys)
        self.matrices: list[Matrix] = []

    @contextmanager
    def loaded(self, device: torch.device, shard: Path | None = None) -> Iterator[None]:
        """While open, the weights are on `device`: the checkpoint's, or those of `shard` where one is given."""
        tensors = read_tensors(shard, self.keys) if shard else self.checkpoint.read(self.keys)
        own = {name: tensor for key, tensor in tensors.items() if (name := self.keys[key])}
        assign(self.module, own, device, self.name)
        try:
            yield
        finally:
            for module in self.module.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, _without_storage(parameter))

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """What is tuned beside the matrices, by full name: biases, and the scales and shifts of norms."""
        own = {name for name in self.keys.values() if name}
        return {
            f"{self.name}.{name}": parameter
            for name, parameter in self.module.named_parameters()
            if name in own and parameter.dim() == 1 and parameter.is_floating_point()
        }

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Running means and variances of norms, by full name."""
        return {
            f"{self.name}.{name}": buffer
            for name, buffer in self.module.named_buffers()
            if name in self.keys.values() and buffer.dim() == 1 and buffer.is_floating_point()
        }

    @property
    def carried(self) -> dict[str, Tensor]:
        """All that goes with the matrices from one iterate to the next."""
        return {name: vector.data for name, vector in self.vectors.items()} | self.statistics

    @property
    def tunable(self) -> dict[str, nn.Parameter]:
        """The prunable weights and the vectors, by full name."""
        return {matrix.parameter: matrix.tensor for matrix in self.matrices} | self.vectors

    def weights(self, shard: Path | None = None) -> dict[str, Tensor]:
        """{matrix's name: weight [R, C], name: what is carried}, as stored, on the CPU: the checkpoint's, or those of
        `shard`.
        """
        keys = {f"{self.name}.{name}": key for key, name in self.keys.items() if name}
        wanted = [keys[name] for name in (*(matrix.parameter for matrix in self.matrices), *self.carried)]
        tensors = read_tensors(shard, wanted) if shard else self.checkpoint.read(wanted)
        matrices = {matrix.name: matrix.turn(tensors[keys[matrix.parameter]]).contiguous() for matrix in self.matrices}
        return matrices | {name: tensors[keys[name]] for name in self.carried}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts what `weights` gives into the module, in the compute dtype."""
        for matrix in self.matrices:
            matrix.write(tensors[matrix.name])
        for name, tensor in self.carried.items():
            tensor.copy_(tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """The block as a shard has it: what has changed from the module, the rest as stored, bit for bit."""
        tensors = self.checkpoint.read(self.keys)
        own = {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
        for key, name in self.keys.items():
            if name in own and not torch.equal(own[name], tensors[key].to(own[name].dtype)):
                tensors[key] = own[name].to(tensors[key].dtype)
        return tensors


def _without_storage(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def assign(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device, what: str) -> None:
    """Gives a module on meta those of its weights that `tensors` holds, in the dtypes the module was made with.

    Raises InputError for a wrong shape or a weight that is not finite.
    """
    expected = module.state_dict()
    for name, tensor in tensors.items():
        stored, configured = tuple(tensor.shape), tuple(expected[name].shape)
        if stored != configured:
            raise InputError(f"{what}.{name} is {stored} in the checkpoint and {configured} by its config")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"the weight {what}.{name} contains NaN or infinity; the checkpoint is damaged")
    ready = {name: tensor.to(device, expected[name].dtype) for name, tensor in tensors.items()}
    module.load_state_dict(ready, strict=False, assign=True)


def require(directory: Path, prefix: str, missing: set[str]) -> None:
    """Raises InputError when the checkpoint has no tensor for some parameters."""
    if missing:
        name = f"{prefix}.{min(missing)}".removeprefix(".")
        raise InputError(
            f"{directory} has no weight for {name}; it is incomplete, or its config names another architecture"
        )


def find_blocks(network: nn.Module, config: Any, pattern: str | None, trunk: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks with their names, in order: modules whose whole name matches `pattern`, else what the config's depth
    points to inside the trunk: the layers of every stage (`depths`), the list of `num_hidden_layers`, or the heaviest
    list there is.

    Raises InputError when nothing is found.
    """
    if pattern:
        found = [(name, module) for name, module in network.named_modules() if re.fullmatch(pattern, name)]
        if not found:
            raise InputError(f"no module's name matches model.blocks = '{pattern}'")
        for (outer, _), (inner, _) in pairwise(found):
            if inner.startswith(f"{outer}."):
                raise InputError(f"{inner} lies inside {outer}; model.blocks = '{pattern}' may match only one of them")
        return found
    depths, depth = getattr(config, "depths", None), getattr(config.get_text_config(), "num_hidden_layers", None)
    root = next(name for name, module in network.named_modules() if module is trunk)
    if depths:
        stages = _heaviest(trunk, root, len(depths), config)
        lists = [_heaviest(stage, name, count, config) for (name, stage), count in zip(stages, depths, strict=True)]
        return [layer for layers in lists for layer in layers]
    return _heaviest(trunk, root, depth, config)


def _heaviest(network: nn.Module, prefix: str, length: int | None, config: Any) -> list[tuple[str, nn.Module]]:
    """The entries, with their names, of the list inside a module that holds most; of `length`, where one is known."""
    lists = [
        (name, module)
        for name, module in network.named_modules(prefix=prefix)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and length in (None, len(module))
    ]
    if not lists:
        raise InputError(
            f"no list of {length or 'some'} blocks in a {config.model_type} model; "
            "name them: --set model.blocks='REGEX' (a pattern of their full module names)"
        )
    name, layers = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    return [(f"{name}.{index}", module) for index, module in enumerate(layers)]
