"""What a checkpoint holds and what would be pruned of it, from its headers alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from obsprune.models.files import Header
from obsprune.models.load import Model
from obsprune.models.names import module_names


def survey(model: Model) -> dict[str, Any]:
    """Plain values about an outline. A weight that is stored under another's name (a tied head) has no dtype."""
    network: Any = model.network
    headers = model.checkpoint.headers
    names = module_names(network, headers)
    stored = {names[key]: header for key, header in headers.items()}
    matrices = [
        {"name": matrix.name, "shape": list(matrix.shape), "dtype": _said(matrix.stored)} for matrix in model.matrices
    ]
    own = network.state_dict()
    return {
        "model": str(model.directory),
        "type": model.config.model_type,
        "architecture": type(network).__name__,
        "kind": model.kind.name,
        "files": [path.name for path in model.checkpoint.paths()],
        "bytes": model.checkpoint.bytes,
        "parameters": sum(_count(header) for header in headers.values()),
        "dtypes": _dtypes(headers.values()),
        "blocks": [block.name for block in model.blocks],
        "prunable": sum(rows * columns for rows, columns in (matrix.shape for matrix in model.matrices)),
        "matrices": matrices,
        "skipped": [_skipped(network, name, why, stored) for name, why in model.skipped.items()],
        "unknown": sorted(key for key, name in names.items() if name not in own),
    }


def _skipped(network: nn.Module, name: str, why: str, stored: dict[str, Header]) -> dict[str, Any]:
    full = name if name in dict(network.named_parameters(remove_duplicate=False)) else f"{name}.weight"
    dtype = _said(stored[full].dtype) if full in stored else None
    return {"name": name, "shape": list(network.get_parameter(full).shape), "dtype": dtype, "why": why}


def _dtypes(headers: Any) -> dict[str, int]:
    """{dtype: how many numbers of it}, the most frequent first."""
    counts: Counter[str] = Counter()
    for header in headers:
        counts[_said(header.dtype)] += _count(header)
    return dict(counts.most_common())


def _count(header: Header) -> int:
    return torch.Size(header.shape).numel()


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
