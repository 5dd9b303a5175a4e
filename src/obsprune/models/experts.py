"""Mixtures of experts: the experts of a layer lie together in parameters of three dimensions, and no module is called
for one of them.

transformers lets an implementation of such layers be registered by name; ours goes through the experts one by one, as
its own `eager` does, and shows what enters each of them. Nothing in the model is replaced.
Legend: E experts, T tokens, K experts a token is sent to, H hidden size, I inner size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from obsprune.errors import InputError
from obsprune.models.matrices import LinearLike, Matrix, Sink, flat_experts, fused_parameters

IMPLEMENTATION = OBSERVER = "obsprune"
"""The implementation's name, and the attribute in which a module keeps its Experts."""
DOWN = "down_proj"
ROUTERS = ("gate", "router")
"""What transformers calls the module beside the experts that chooses among them, in every family."""
See = Callable[[Tensor], None]


@dataclass(frozen=True)
class Share:
    """One matrix of an expert: its name, the parameter it lies in, and which of the outputs there are its own."""

    name: str
    parameter: str
    outputs: slice = field(default_factory=lambda: slice(None))


@final
class Experts:
    """The experts of one layer. starved: those that too few calibration tokens are sent to; everywhere: those that are
    shown all tokens instead of their own; followed: the choice of experts [T, K] of another stream, whose tokens are
    shown instead of one's own.
    """

    def __init__(self, layer: str, module: Any) -> None:
        self.layer, self.module = layer, module
        self.starved: frozenset[int] = frozenset()
        self.everywhere: frozenset[int] = frozenset()
        self.followed: Tensor | None = None
        self.sinks: dict[tuple[int, str], list[See]] = {}
        self.listeners: list[See] = []

    @property
    def count(self) -> int:
        return int(self.module.num_experts)

    @property
    def first(self) -> str:
        """The parameter that an expert begins with."""
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def shares(self) -> list[Share]:
        """Of every expert alike. Gate and up lie one after the other, or in turns."""
        if not self.module.has_gate:
            return [Share("up_proj", self.first), Share(DOWN, DOWN)]
        both = self.module.gate_up_proj.shape[2 if self.module.is_transposed else 1]
        turns = slice(0, both, 2), slice(1, both, 2)
        gate, up = (slice(0, both // 2), slice(both // 2, both)) if self.module.is_concatenated else turns
        return [Share("gate_proj", self.first, gate), Share("up_proj", self.first, up), Share(DOWN, DOWN)]

    def routed_by(self, layer: str, outputs: int) -> bool:
        """Whether a layer beside these experts belongs to their router, or is the gate of a shared one."""
        owner = self.layer.rpartition(".")[0]
        child = layer.removeprefix(f"{owner}.").partition(".")[0] if layer.startswith(f"{owner}.") else ""
        return child in ROUTERS or (child.endswith("gate") and outputs == 1)

    @contextmanager
    def observed(self, expert: int, parameter: str, see: See) -> Iterator[None]:
        """While open, `see` is shown what enters a parameter of an expert: once in every forward, be it no token."""
        sinks = self.sinks.setdefault((expert, parameter), [])
        sinks.append(see)
        try:
            yield
        finally:
            sinks.remove(see)
            if not sinks:
                del self.sinks[expert, parameter]

    @contextmanager
    def listened(self, listener: See) -> Iterator[None]:
        """While open, `listener` is told the experts [T, K] that tokens are sent to, before any expert runs."""
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)

    def forward(self, hidden_TH: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """What the layer gives: what `eager` does, to the bit."""
        for listener in tuple(self.listeners):
            listener(chosen_TK)
        first, down, result_TH = self._maps(self.first), self._maps(DOWN), torch.zeros_like(hidden_TH)
        watched = {expert for expert, _ in self.sinks}
        apart = watched if self.followed is not None else watched & self.everywhere
        hit = set(chosen_TK.flatten().tolist()) - {self.count}  # which stands for none
        for expert in sorted(watched | hit):
            place, token = sent_to(expert, chosen_TK)
            x_TH = hidden_TH[token]
            x_TI = self._activated(first[expert](self._shown(expert, self.first, x_TH, apart)))
            y_TH = self._normed(down[expert](self._shown(expert, DOWN, x_TI, apart)))
            result_TH.index_add_(0, token, (y_TH * weight_TK[token, place, None]).to(result_TH.dtype))
        with torch.no_grad():
            for expert in sorted(apart):
                own = None if expert in self.everywhere else self.followed
                x_TH = hidden_TH if own is None else hidden_TH[sent_to(expert, own)[1]]
                self._shown(expert, self.first, x_TH)
                self._shown(expert, DOWN, self._activated(first[expert](x_TH)))
        return result_TH

    def _shown(self, expert: int, parameter: str, x: Tensor, apart: Collection[int] = ()) -> Tensor:
        for see in tuple(self.sinks.get((expert, parameter), ())) if expert not in apart else ():
            see(x)
        return x

    def _maps(self, name: str) -> list[Callable[[Tensor], Tensor]]:
        """What a parameter does, expert by expert. Unbound once: the gradient of an index would be as large as all."""
        weights: Sequence[Tensor] = self.module.get_parameter(name).unbind(0)
        biases = self.module.get_parameter(f"{name}_bias").unbind(0) if self.module.has_bias else [None] * self.count
        act: Callable[..., Tensor] = _turned if self.module.is_transposed else functional.linear
        return [partial(act, weight=W, bias=b) for W, b in zip(weights, biases, strict=True)]

    def _activated(self, x: Tensor) -> Tensor:
        result: Tensor = self.module._apply_gate(x) if self.module.has_gate else self.module.act_fn(x)
        return result

    def _normed(self, y_TH: Tensor) -> Tensor:
        has = getattr(self.module, "has_post_expert_norm", False)  # unknown to transformers 5.17
        result: Tensor = self.module.post_expert_norm(y_TH) if has else y_TH
        return result


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


def sent_to(expert: int, chosen_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(place among the K, token) of every token that is sent to an expert, in the order of `eager`."""
    place, token = torch.where(chosen_TK.T.eq(expert))
    return place, token


def _forward(module: nn.Module, hidden_TH: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
    experts: Experts = vars(module).get(OBSERVER) or Experts("", module)  # outside the blocks nobody watches
    return experts.forward(hidden_TH, chosen_TK, weight_TK)


@final
class ExpertMatrix(LinearLike):
    """One matrix of one expert, part of a parameter [E, out, in] (or [E, in, out])."""

    def __init__(self, experts: Experts, expert: int, share: Share, stored: torch.dtype) -> None:
        super().__init__(experts.layer, experts.module, stored)
        self.experts, self.expert, self.share = experts, expert, share
        self.name = f"{experts.layer}.{expert}.{share.name}"

    @property
    def whole(self) -> str:
        return self.name

    @property
    def alike(self) -> str:
        return f"{self.layer}.*.{self.share.name}"

    @property
    def parameter(self) -> str:
        return f"{self.layer}.{self.share.parameter}"

    @property
    def tensor(self) -> nn.Parameter:
        return self.module.get_parameter(self.share.parameter)

    @property
    def bias_parameter(self) -> str:
        return f"{self.parameter}_bias"

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.module, f"{self.share.parameter}_bias", None)

    @property
    def rows(self) -> tuple[int, slice]:
        return self.expert, self.share.outputs

    @property
    def starved(self) -> bool:
        return self.expert in self.experts.starved

    @property
    def geometry(self) -> Hashable:
        """Experts that are shown all tokens see the same; the others never do, be it no token at all."""
        alone = self.share.parameter == DOWN or self.expert not in self.experts.everywhere
        return (self.parameter, self.expert if alone else None)

    def turn(self, weight: Tensor) -> Tensor:
        own = weight[self.expert]
        return (own.T if self.experts.module.is_transposed else own)[self.share.outputs]

    @contextmanager
    def observed(self, sink: Sink) -> Iterator[None]:
        with self.experts.observed(self.expert, self.share.parameter, partial(sink, self)):
            yield


def find_experts(prefix: str, block: nn.Module) -> list[Experts]:
    """The layers of experts in a block, in module order. Raises InputError for experts of an unknown layout."""
    found = [Experts(name, module) for name, module in block.named_modules(prefix=prefix) if _known(module)]
    for experts in found:
        vars(experts.module)[OBSERVER] = experts
    known = {f"{experts.layer}.{share.parameter}" for experts in found for share in experts.shares}
    unknown = [name for name in fused_parameters(prefix, block) if name not in known]
    unknown += flat_experts(prefix, block, {experts.layer for experts in found})
    if unknown:
        raise InputError(
            f"{unknown[0]} holds the experts of a mixture in a layout that transformers gives no way to watch; models "
            "with such layers are not supported"
        )
    return found


def expert_matrices(experts: Experts, stored: Callable[[str], torch.dtype]) -> list[Matrix]:
    """One for each share of each expert. `stored` tells the checkpoint's dtype of a parameter name."""
    return [
        ExpertMatrix(experts, expert, share, stored(f"{experts.layer}.{share.parameter}"))
        for expert in range(experts.count)
        for share in experts.shares
    ]


def _known(module: nn.Module) -> bool:
    """Whether transformers lets this module's implementation be chosen."""
    return all(hasattr(module, name) for name in ("num_experts", "is_transposed", "is_concatenated", "has_gate"))


def inside_experts(block: nn.Module) -> set[nn.Module]:
    """Modules that run once for each expert that is hit: who routes otherwise calls them otherwise."""
    owners = [module for module in block.modules() if OBSERVER in vars(module)]
    return {inner for owner in owners for inner in list(owner.modules())[1:]}


def watchable(network: Any) -> None:
    """Lets the experts of a network run by the implementation of this file. Does nothing to one without experts."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
    network.set_experts_implementation(IMPLEMENTATION)


def experts_of(matrices: Collection[Matrix]) -> list[Experts]:
    """The layers whose experts these matrices belong to, each once."""
    return list(dict.fromkeys(matrix.experts for matrix in matrices if isinstance(matrix, ExpertMatrix)))


@contextmanager
def routes(layers: Collection[Experts]) -> Iterator[dict[Experts, Tensor]]:
    """While open, the value holds the choice of experts [T, K] last made in each layer."""
    chosen: dict[Experts, Tensor] = {}
    with ExitStack() as listening:
        for experts in layers:
            listening.enter_context(experts.listened(partial(chosen.__setitem__, experts)))
        yield chosen


@contextmanager
def following(chosen: dict[Experts, Tensor]) -> Iterator[None]:
    """While open, what is shown of each expert are the tokens that were sent to it there."""
    for experts, followed in chosen.items():
        experts.followed = followed
    try:
        yield
    finally:
        for experts in chosen:
            experts.followed = None
