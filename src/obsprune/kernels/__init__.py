"""Triton versions of inner loops that core has in plain torch: the same numbers to rounding, on GPUs.

Whoever has a tile asks `take(V_BR)` and imports a kernel only then: Triton need not be there, and costs nothing where
it is not used. Without a GPU the kernels run in Triton's interpreter, slowly, if TRITON_INTERPRET=1 is set before
Triton is imported; so they are tested.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from obsprune.errors import first_line

COLUMNS = 128
"""Of a tile at most, or its rows do not fit in registers."""


def take(V_BR: Tensor) -> bool:
    """Whether the kernels can have this tile of columns; plain torch does those they cannot."""
    return len(V_BR) <= COLUMNS and available(V_BR.device)


@cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device, found by running one on a problem whose answer is known.

    Triton needs a GPU it knows and a C compiler, too. Where there is a GPU and they do not run, a warning says why.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        return _right(device)
    except Exception as error:  # whatever a compiler raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        warnings.warn(
            f"Triton's kernels cannot run on {device}, and plain torch, which is slower, does their work ({reason})",
            stacklevel=3,
        )
        return False


def _right(device: torch.device) -> bool:
    from obsprune.kernels.column_sweep import sweep

    V_BR, G_BB = torch.tensor([[4.0], [3.0]], device=device), torch.full((2, 2), 0.5, device=device)
    sweep(V_BR, G_BB, torch.zeros_like(V_BR, dtype=torch.bool))
    if V_BR.tolist() != [[4.0], [1.0]]:
        raise ArithmeticError(f"they give {V_BR.flatten().tolist()}, and not [4, 1]")
    return True
