"""Which weights are pruned, and why each other one stays dense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from obsprune.models.blocks import Block
from obsprune.models.checkpoint import Checkpoint
from obsprune.models.kinds import Kind, head_of
from obsprune.models.matrices import Matrix, find_matrices


def choose_matrices(
    kind: Kind,
    network: nn.Module,
    blocks: list[Block],
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    skip: list[str],
    depthwise: bool,
) -> dict[str, str]:
    """Gives each block its matrices; returns {weight: why it stays dense} for every other weight of two dimensions."""
    stored = {name: checkpoint.headers[key].dtype for key, name in names.items()}
    skipped: dict[str, str] = {}
    for block in blocks:
        for matrix in find_matrices(block.name, block.module, lambda name: stored[name]):
            why = _why_skipped(matrix, skip, depthwise)
            if why:
                skipped[matrix.layer] = why
            else:
                block.matrices.append(matrix)
    pruned = {matrix.parameter for block in blocks for matrix in block.matrices}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1 and name not in pruned and name.removesuffix(".weight") not in skipped:
            skipped[name.removesuffix(".weight")] = _why_dense(kind, network, name, {block.name for block in blocks})
    return skipped


def _why_skipped(matrix: Matrix, skip: list[str], depthwise: bool) -> str | None:
    pattern = next((pattern for pattern in skip if re.search(pattern, matrix.name)), None)
    if pattern:
        return f"matches --skip {pattern}"
    own = matrix.depthwise and not depthwise
    return "depthwise convolution; --set model.depthwise=true prunes them, too" if own else None


def _why_dense(kind: Kind, network: Any, name: str, blocks: set[str]) -> str:
    if any(name.startswith(f"{block}.") for block in blocks):
        return "not a linear layer"
    owner = network.get_submodule(name.rpartition(".")[0])
    if owner is head_of(network):
        return "output head"
    if owner is _embedding_of(network):
        return "embedding"
    inside = any(owner is module for module in kind.trunk(network).modules())
    return "outside the blocks" if inside else "outside the language part"


def _embedding_of(network: Any) -> nn.Module | None:
    try:
        embedding: nn.Module = network.get_input_embeddings()
    except NotImplementedError:  # convolutional networks have none
        return None
    return embedding
