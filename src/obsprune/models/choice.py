"""Which weights are pruned, and why each other one stays dense."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from obsprune.models.blocks import Block
from obsprune.models.checkpoint import Checkpoint
from obsprune.models.experts import expert_matrices, find_experts
from obsprune.models.kinds import Kind, head_of
from obsprune.models.matrices import Matrix, find_matrices
from obsprune.models.names import Names

ROUTER = "router, or gate of a shared expert"


def choose_matrices(
    kind: Kind,
    network: nn.Module,
    blocks: list[Block],
    checkpoint: Checkpoint,
    names: Names,
    skip: list[str],
    depthwise: bool,
) -> dict[str, str]:
    """Gives each block its matrices, to prune and to leave; returns {weight: why it stays dense} for each weight of two
    dimensions that is not pruned.
    """
    stored = {name: checkpoint.headers[keys[0]].dtype for name, keys in names.sources.items()}
    skipped: dict[str, str] = {}
    for block in blocks:
        block.experts = find_experts(block.name, block.module)
        fused = [matrix for experts in block.experts for matrix in expert_matrices(experts, stored.__getitem__)]
        for matrix in [*find_matrices(block.name, block.module, stored.__getitem__), *fused]:
            routing = block.routed_by(matrix.layer, matrix.shape[0])
            why = ROUTER if routing else _why_skipped(matrix, skip, depthwise)
            if why:
                skipped[matrix.whole] = why
            (block.left if why else block.matrices).append(matrix)
    told = {matrix.parameter for block in blocks for matrix in [*block.matrices, *block.left]}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1 and name not in told:
            skipped[name.removesuffix(".weight")] = _why_dense(kind, network, name, blocks)
    return skipped


def _why_skipped(matrix: Matrix, skip: list[str], depthwise: bool) -> str | None:
    pattern = next((pattern for pattern in skip if re.search(pattern, matrix.name)), None)
    if pattern:
        return f"matches --skip {pattern}"
    own = matrix.depthwise and not depthwise
    return "depthwise convolution; --set model.depthwise=true prunes them, too" if own else None


def _why_dense(kind: Kind, network: Any, name: str, blocks: list[Block]) -> str:
    block = next((block for block in blocks if name.startswith(f"{block.name}.")), None)
    if block:
        routing = block.routed_by(name.removesuffix(".weight"), len(network.get_parameter(name)))
        return ROUTER if routing else "not a linear layer"
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
