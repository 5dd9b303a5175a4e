"""What pruning each block costs beside the others, known before any of them is pruned: what tells the time left."""

from __future__ import annotations

from collections.abc import Mapping

from obsprune.models.blocks import Block
from obsprune.models.load import Model

DIGITS = 3
"""Significant ones: what differs by less is alike."""
HELD, SWEPT = 400, 0.4
"""What it takes to hold a number that enters a matrix, and a multiplication in a solver, beside one of a forward pass
or a Gram. Measured on ResNet-50 and Swin-T, whose stages differ in nothing else; the blocks of language models are
alike in all three.
"""


def efforts(model: Model, tokens: Mapping[str, float]) -> list[float]:
    """Multiplications of each block, in order. tokens: how many enter each matrix, by its name, in all of the
    calibration.
    """
    return [float(f"{_effort(block, tokens):.{DIGITS}g}") for block in model.blocks]


def _effort(block: Block, tokens: Mapping[str, float]) -> float:
    """Tokens held, sent through the weights and summed up in Grams; each Gram factorised, each matrix swept. A block
    without matrices is loaded and run.
    """
    total = float(sum(parameter.numel() for parameter in block.module.parameters()))
    for matrix in block.matrices:
        rows, columns = matrix.shape
        total += tokens.get(matrix.name, 0.0) * columns * (rows + columns + HELD)
        total += SWEPT * columns**2 * (rows + columns)
    return total
