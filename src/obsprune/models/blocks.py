"""Blocks: the repeated layers a model is made of, found without knowing the family, and loaded one at a time."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from obsprune.errors import InputError
from obsprune.models.ahead import ReadAhead
from obsprune.models.checkpoint import Checkpoint, read_tensors
from obsprune.models.experts import Experts
from obsprune.models.matrices import Matrix
from obsprune.models.names import Names


@final
class Block:
    """One block: on the meta device until `loaded`, on it again afterwards. names: how its tensors are stored;
    matrices: to prune; left: those that stay dense; ahead: reads its weights before they are needed.
    """

    def __init__(self, name: str, module: nn.Module, checkpoint: Checkpoint, names: Names) -> None:
        self.name, self.module, self.checkpoint, self.names = name, module, checkpoint, names
        self.matrices: list[Matrix] = []
        self.left: list[Matrix] = []
        self.experts: list[Experts] = []
        self.ahead: ReadAhead | None = None

    @property
    def keys(self) -> list[str]:
        """Of its tensors in the checkpoint."""
        return self.names.keys

    @contextmanager
    def loaded(self, device: torch.device, shard: Path | None = None) -> Iterator[None]:
        """While open, the weights are on `device`: the checkpoint's, or those of `shard` where one is given."""
        ahead = self.ahead.read(self) if self.ahead and shard is None else None
        parameters = self.names.join(ahead) if ahead else self._parameters(self.names, shard)
        known = self.module.state_dict()
        own = {inner: x for name, x in parameters.items() if (inner := self._inner(name)) in known}
        assign(self.module, own, device, self.name)
        try:
            yield
        finally:
            for module in self.module.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, _without_storage(parameter))

    def _parameters(self, names: Names, shard: Path | None) -> dict[str, Tensor]:
        return names.join(read_tensors(shard, names.keys) if shard else self.checkpoint.read(names.keys))

    def _inner(self, name: str) -> str:
        return name.removeprefix(f"{self.name}.")

    def leave(self, matrices: Collection[Matrix]) -> None:
        """These stay dense after all."""
        self.left += matrices
        self.matrices = [matrix for matrix in self.matrices if matrix not in matrices]

    def routed_by(self, layer: str, outputs: int) -> bool:
        """Whether a layer decides which expert of the block a token is sent to, or how much a shared one counts."""
        return any(experts.routed_by(layer, outputs) for experts in self.experts)

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """What is tuned beside the matrices, by full name: biases, and the scales and shifts of norms."""
        biases = {matrix.bias_parameter for matrix in self.matrices if matrix.bias is not None}
        return {
            full: parameter
            for name, parameter in self.module.named_parameters()
            if (full := f"{self.name}.{name}") in self.names.sources
            and (parameter.dim() == 1 or full in biases)
            and parameter.is_floating_point()
        }

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Running means and variances of norms, by full name."""
        return {
            full: buffer
            for name, buffer in self.module.named_buffers()
            if (full := f"{self.name}.{name}") in self.names.sources and buffer.dim() == 1
            if buffer.is_floating_point()
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
        wanted = [*(matrix.parameter for matrix in self.matrices), *self.carried]
        tensors = self._parameters(self.names.making(wanted), shard)
        matrices = {matrix.name: matrix.turn(tensors[matrix.parameter]).contiguous() for matrix in self.matrices}
        return matrices | {name: tensors[name] for name in self.carried}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts what `weights` gives into the module, in the compute dtype."""
        for matrix in self.matrices:
            matrix.write(tensors[matrix.name])
        for name, tensor in self.carried.items():
            tensor.copy_(tensors[name])

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts what `tensors` gives into the module: as `loaded` would read it from a shard."""
        own = self.module.state_dict()
        for name, tensor in self.names.join(tensors).items():
            if (inner := self._inner(name)) in own:
                own[inner].copy_(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """The block as a shard has it: what has changed from the module, the rest as stored, bit for bit."""
        tensors, own = self.checkpoint.read(self.keys), self.module.state_dict()
        for part in self.names.parts:
            if self._inner(part.names[0]) in own:
                stored = part.join({key: tensors[key] for key in part.keys})
                now = {name: merged(x, own[self._inner(name)].detach().cpu()) for name, x in stored.items()}
                if any(now[name] is not x for name, x in stored.items()):
                    tensors |= part.split(now)
        return tensors


def merged(stored: Tensor, now: Tensor) -> Tensor:
    """`stored` itself where nothing has changed in the dtype of `now`; else a copy with what has, in its own dtype."""
    same = stored.to(now.dtype) == now
    return stored if bool(same.all()) else torch.where(same, stored, now.to(stored.dtype))


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
    ready = {name: tensor.to(device, expected[name].dtype, non_blocking=True) for name, tensor in tensors.items()}
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
