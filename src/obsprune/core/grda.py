"""gRDA, generalized regularized dual averaging (Chao, Wang, Xing & Cheng 2020, "Directional Pruning of Deep Neural
Networks", arXiv 2006.09358, Algorithm 1): SGD on an accumulator, whose soft threshold is the network.

    v_{n+1} = v_n − γ ∇f(w_n),   w_{n+1} = S_g(v_{n+1}),   g(n, γ) = c γ^{1/2} (n γ)^μ,   v_0 = w_0

Legend: v the accumulator, w the weights, γ the learning rate, g the threshold, S_g(v) = sign(v) max(|v| − g, 0).
With c = 0 it is SGD. Weights become exactly 0 and may come back. There is no momentum and no weight decay: both would
enter v and break the relation to directional pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from obsprune.errors import InputError


class GRDA(torch.optim.Optimizer):
    """lr: γ; c: how strong the threshold is (the paper's are 5e-5 to 5e-3); mu: how fast it grows, in (0.5, 1) in the
    paper's theory. All three by parameter group, and lr may change from step to step: g grows by what each step adds
    at its own rate. A group with c = 0 stays dense.

    The accumulator is float32 at least, and as large as the weights. Raises InputError for a value that cannot be.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-2, c: float = 5e-4, mu: float = 0.6) -> None:
        super().__init__(params, {"lr": lr, "c": c, "mu": mu})
        for group in self.param_groups:
            _check(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every parameter that has a gradient; returns what `closure` gave."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["c"], group["mu"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved, bit for bit: torch alone would round the accumulator to the parameter's dtype."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                saved = state_dict["state"][number]["accumulator"]
                self.state[parameter]["accumulator"] = saved.to(parameter.device, copy=True)

    def _step(self, parameter: nn.Parameter, lr: float, c: float, mu: float) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "threshold": 0.0, "accumulator": _accumulator(parameter)}
        state["step"] += 1
        state["threshold"] += growth(state["step"], lr, c, mu)
        v, g = state["accumulator"], state["threshold"]
        v.add_(parameter.grad, alpha=-lr)
        parameter.copy_(v - v.clamp(-g, g))  # S_g(v), exactly 0 inside; a NaN stays one


def growth(number: int, lr: float, c: float, mu: float) -> float:
    """What step `number`, from 1 up, adds to the threshold; at one and the same lr they add up to g(n, γ)."""
    return float(c * lr ** (mu + 0.5) * (number**mu - (number - 1) ** mu))


def threshold(steps: int, lr: float, c: float, mu: float) -> float:
    """g(n, γ) = c γ^{1/2} (n γ)^μ."""
    return float(c * lr**0.5 * (steps * lr) ** mu)


def directional_scores(w: Tensor, flat: Callable[[Tensor], Tensor]) -> Tensor:
    """s = sign(w) · Π₀ sign(w), of w's shape (their equation 2). flat: Π₀, the projector onto the directions in which
    the loss does not change. Where s is positive, w shrinks on the way −Π₀ sign(w), on which the loss stays.
    """
    return w.sign() * flat(w.sign())


def directional_pruning(w: Tensor, s: Tensor, strength: float) -> Tensor:
    """argmin over x of ½ ‖w − x‖² + λ Σ s_j |x_j|, λ = strength (their equation 3). One formula for both signs of s:
    scores below 0 make a weight larger; one that is 0 stays.
    """
    return w.sign() * (w.abs() - strength * s).clamp(min=0)


def _accumulator(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def _check(group: dict[str, Any]) -> None:
    lr, c, mu = (float(group[name]) for name in ("lr", "c", "mu"))
    if not (lr >= 0 and c >= 0 and mu > 0):
        raise InputError(f"lr={lr:g}, c={c:g}, mu={mu:g}: lr and c from 0 up and mu above 0 are expected")
