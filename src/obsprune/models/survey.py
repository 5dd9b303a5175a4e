"""What a checkpoint holds and what would be pruned of it, from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from obsprune.models.files import Header
from obsprune.models.load import Model
from obsprune.models.matrices import Matrix
from obsprune.progress import Progress


def survey(model: Model) -> dict[str, Any]:
    """Plain values about an outline. A weight that is stored under another's name (a tied head) has no dtype."""
    network: Any = model.network
    headers = model.checkpoint.headers
    sources = model.names.sources
    stored = {name: headers[keys[0]] for name, keys in sources.items()}
    matrices = [
        {"name": m.name, "alike": m.alike, "shape": list(m.shape), "dtype": _said(m.stored)} for m in model.matrices
    ]
    own = network.state_dict()
    left = {matrix.whole: matrix for block in model.blocks for matrix in block.left}
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
        "skipped": [_skipped(network, name, why, stored, left) for name, why in model.skipped.items()],
        "unknown": sorted(key for name, keys in sources.items() if name not in own for key in keys),
    }


def count_zeros(model: Model, progress: Progress) -> list[dict[str, Any]]:
    """One entry a matrix, as report.json has them: its block, name, shape, zeros and sparsity, and the dtype it is
    stored in. Reads the weights, a block at a time.
    """
    found = []
    progress.stage("counting zeros", len(model.blocks))
    for block in model.blocks:
        weights = block.weights() if block.matrices else {}
        for matrix in block.matrices:
            weight, own = weights[matrix.name], {"block": block.name, "name": matrix.name}
            zeros = int((weight == 0).sum())
            counted = {"zeros": zeros, "sparsity": zeros / weight.numel(), "dtype": _said(matrix.stored)}
            found.append({**own, "shape": list(weight.shape), **counted})
        progress.step()
    return found


def _skipped(
    network: nn.Module, name: str, why: str, stored: Mapping[str, Header], left: Mapping[str, Matrix]
) -> dict[str, Any]:
    known = dict(network.named_parameters(remove_duplicate=False))
    full = next((one for one in (name, f"{name}.weight") if one in known), None)
    if full is None:  # a matrix of an expert, which is no parameter of its own
        matrix = left[name]
        return {"name": name, "shape": list(matrix.shape), "dtype": _said(matrix.stored), "why": why}
    dtype = _said(stored[full].dtype) if full in stored else None
    return {"name": name, "shape": list(known[full].shape), "dtype": dtype, "why": why}


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
