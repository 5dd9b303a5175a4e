"""2:4 sparse Linear layers on GPUs whose tensor cores skip the zeros: torch's semi-structured tensors.

    model = AutoModelForCausalLM.from_pretrained("two-of-four", dtype=torch.bfloat16, device_map="cuda")
    obsprune.to_semi_structured(model)

A weight then takes 9/16 of its bytes: half of the numbers, and two bits for the place of each. Whether it is faster
depends on shapes and batch; `obsprune bench-inference` measures it. What can be converted is decided before anything
is, and needs no GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Kernel

from obsprune.errors import InputError
from obsprune.models.matrices import linears
from obsprune.progress import Progress, Silent

DTYPES = (torch.float16, torch.bfloat16, torch.int8)
CAPABILITY = (8, 0)
"""Ampere: the first GPUs with sparse tensor cores."""
NAMED = 3
"""Layers that a notice names."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@final
@dataclass(frozen=True)
class Rule:
    """What a weight must be. name: of the breach; broken: a weight -> what is wrong with it, or nothing; way_out: what
    a person can do about it.
    """

    name: str
    broken: Callable[[Tensor], str | None]
    way_out: str


@final
@dataclass(frozen=True)
class Candidate:
    """A Linear layer, and the rule that its weight breaks, with the values; none where it can be converted."""

    name: str
    layer: nn.Linear
    broken: Rule | None = None
    why: str | None = None


def _not_two_of_four(weight: Tensor) -> str | None:
    rows, columns = weight.shape
    if columns % 4:
        return f"{columns} inputs are no multiple of 4"
    full = int(((weight.reshape(rows, -1, 4) != 0).sum(2) > 2).sum())
    return f"{full:,} of {weight.numel() // 4:,} groups of four inputs hold more than two numbers" if full else None


def _wrong_dtype(weight: Tensor) -> str | None:
    known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return None if weight.dtype in DTYPES else f"{str(weight.dtype).removeprefix('torch.')}, not one of {known}"


def _wrong_shape(weight: Tensor) -> str | None:
    least = Kernel._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    rows, columns = weight.shape
    fits = rows and columns and not rows % least.sparse_min_rows and not columns % least.sparse_min_cols
    return None if fits else f"{rows} x {columns} is no multiple of {least.sparse_min_rows} x {least.sparse_min_cols}"


def _elsewhere(weight: Tensor) -> str | None:
    return None if weight.is_cuda else f"on {weight.device}"


SHARED = Rule("weight shared with another layer", lambda weight: None, "untie it, or leave it dense")
RULES = (
    Rule("not 2:4", _not_two_of_four, "prune the model so: obsprune prune MODEL --pattern 2:4"),
    Rule("dtype", _wrong_dtype, "load it with dtype=torch.bfloat16"),
    Rule("shape", _wrong_shape, "such a layer stays dense"),
    Rule("not on CUDA", _elsewhere, 'move it there: model.to("cuda")'),
)
"""In this order: what the first one passes, the later ones may take for granted."""


def candidates(model: nn.Module) -> list[Candidate]:
    """Every Linear layer of a model, and why its weight cannot be made semi-structured as it is now, if it cannot."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [_judged(name, layer, owners[id(layer.weight)] > 1) for name, layer in linears(model).items()]


def _judged(name: str, layer: nn.Linear, shared: bool) -> Candidate:
    if shared:
        return Candidate(name, layer, SHARED, "both would have to be converted")
    for rule in RULES:
        why = rule.broken(layer.weight.detach())
        if why:
            return Candidate(name, layer, rule, why)
    return Candidate(name, layer)


@torch.no_grad()
def to_semi_structured(model: AnyModule, progress: Progress | None = None) -> AnyModule:
    """Turns the weight of every nn.Linear that is 2:4 along its inputs into a tensor that GPUs multiply by faster, in
    place; returns the model. For inference: the weights cannot be trained, moved to another dtype, or saved afterwards.

    Taken are weights in float16, bfloat16 or int8, of a shape that cuSPARSELt takes, on a CUDA device of compute
    capability 8.0 or more, that no other layer shares. All others stay as they are. progress: is told which, and why
    (so does `candidates`).

    Raises InputError, and changes nothing, where the machine cannot do it, or no layer can be converted.
    """
    require_machine(model)
    watch = progress or Silent()
    found = candidates(model)
    chosen = require_some(found)
    for candidate in chosen:
        sparse = torch.sparse.to_sparse_semi_structured(candidate.layer.weight.detach().contiguous())
        candidate.layer.weight = nn.Parameter(sparse, requires_grad=False)
    watch.notice(f"{len(chosen)} of {len(found)} Linear layers are semi-structured now")
    for told in reasons(found):
        watch.notice(f"dense: {told}")
    return model


def require_machine(model: nn.Module) -> None:
    """Raises InputError where no device here, or not the model's, can multiply by semi-structured tensors."""
    if not torch.cuda.is_available():
        raise InputError(
            f"semi-structured weights need a CUDA device, and torch {torch.__version__} sees none here; use the model "
            "as it is"
        )
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    for device in devices or {torch.device("cuda")}:
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            raise InputError(
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
                "semi-structured weights need 8.0 or more (Ampere and later); use the model as it is"
            )
    if not torch.backends.cusparselt.is_available():
        raise InputError(
            f"torch {torch.__version__} was built without cuSPARSELt, which multiplies semi-structured weights; "
            "install torch's own CUDA build"
        )


def require_some(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that can be converted. Raises InputError when there is none: how many break which rule, and the way out."""
    chosen = [candidate for candidate in found if candidate.broken is None]
    if chosen:
        return chosen
    counts = Counter(candidate.broken for candidate in found if candidate.broken)
    told = ", ".join(f"{count} {rule.name}" for rule, count in counts.most_common())
    # the last rule that any breaks is what keeps those from it that are nearest to it
    nearest = max(counts, key=[SHARED, *RULES].index, default=RULES[0])
    raise InputError(
        f"none of the {len(found)} Linear layers can be made semi-structured ({told or 'there are none'}); "
        f"{nearest.way_out}"
    )


def reasons(found: Sequence[Candidate]) -> list[str]:
    """A sentence for each rule that is broken: how many layers, the first of them, and why."""
    rules = dict.fromkeys(candidate.broken for candidate in found if candidate.broken)
    return [_told(rule, [candidate for candidate in found if candidate.broken is rule]) for rule in rules]


def _told(rule: Rule, breakers: Sequence[Candidate]) -> str:
    names = ", ".join(f"{candidate.name} ({candidate.why})" for candidate in breakers[:NAMED])
    more = f" and {len(breakers) - NAMED} more" if len(breakers) > NAMED else ""
    return f"{len(breakers)} {rule.name}: {names}{more}"
