"""The table of docs/models.md: what is tried on a tiny model of every architecture, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo import (
    MIXTURES,
    MORE_MIXTURES,
    PICTURED,
    ZOO,
    Zoo,
    logits,
    pixel_batches,
    reference,
    reference_classifier,
    tensors,
)
from zoo import token_batches as text_batches

from obsprune.engine.preflight import check_walk
from obsprune.errors import ObspruneError
from obsprune.models.load import Model, load
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe

SECTIONS = {"Language models": ZOO, "Mixtures of experts": MIXTURES | MORE_MIXTURES, "Image classifiers": PICTURED}
COLUMNS = ("architecture", "tried as", "matrices", "round-trip", "walk", "prune", "reload")


def row(zoo: Zoo, name: str, data: Path, output: Path) -> str:
    """One line of the table."""
    source = zoo(name)
    model = load(str(source))
    report = pruned(source, data, output)
    verdicts = (round_trip(model), walks(model, batch_of(name)), halved(source, output, report), reloads(name, output))
    said = ("yes" if met else "NO" for met in verdicts)
    cells = (type(model.network).__name__, name, str(len(model.matrices)), *said)
    return f"| {' | '.join(cells)} |"


def batch_of(name: str) -> dict[str, Tensor]:
    return pixel_batches(1)[0] if name in PICTURED else text_batches(1)[0]


def pruned(source: Path, data: Path, output: Path) -> dict[str, Any]:
    part = {"dataset": str(data), "nsamples": 8, "seqlen": 32, "heldout": 0}
    tree = {"model": {"name": str(source)}, "data": part, "evaluation": ["none"], "solver": {"name": "magnitude"}}
    return prune(make_recipe(tree), output, Silent())


def round_trip(model: Model) -> bool:
    """Every tensor of every block, loaded and stored again, is what it was, to the bit."""
    for block in model.blocks:
        with block.loaded(model.device):
            found, stored = block.tensors(), model.checkpoint.read(block.keys)
        if found.keys() != stored.keys() or not all(torch.equal(found[key], stored[key]) for key in stored):
            return False
    return True


def walks(model: Model, batch: dict[str, Tensor]) -> bool:
    """Block by block, its outputs are those of one whole forward, to the bit."""
    try:
        check_walk(model, batch, Silent())
    except ObspruneError:
        return False
    return True


def halved(source: Path, output: Path, report: dict[str, Any]) -> bool:
    """Half of every matrix is zero; under the same names, all else is as it was."""
    model, before, after = load(str(source)), tensors(source), tensors(output)
    own = {key for matrix in model.matrices for key in model.names.sources[matrix.parameter]}
    same = all(torch.equal(before[key], after[key]) for key in before if key not in own)
    zeros = all(m["zeros"] == round(0.5 * m["shape"][0] * m["shape"][1]) for m in report["matrices"])
    return before.keys() == after.keys() and same and zeros and len(report["matrices"]) == len(model.matrices)


def reloads(name: str, output: Path) -> bool:
    """transformers reads the result, with the same logits, to the bit."""
    read: Callable[..., Any] = reference_classifier if name in PICTURED else reference
    plain, ours, batch = read(output), load(str(output)), batch_of(name)
    with ours.lazily_loaded():
        return torch.equal(logits(ours.network, batch), logits(plain, batch))


def page(rows: dict[str, str]) -> str:
    """The whole document, from the lines by name."""
    parts = [INTRODUCTION]
    for title, families in SECTIONS.items():
        head = [f"## {title}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        parts.append("\n".join([*head, *(rows[name] for name in families)]))
    return "\n\n".join([*parts, NOTES]) + "\n"


INTRODUCTION = """# Models

No family is named in the code: blocks, layers and experts are found by what they are. The architectures below are tried
on tiny random models by the tests; `python scripts/models_table.py` writes this page, and the tests hold it against
what they find. Others of the same build work too: a model is checked before anything is written.

- **round-trip**: every tensor of the blocks, loaded and stored again, is what it was, to the bit, under its own name
- **walk**: block by block, the logits are those of one whole forward, to the bit
- **prune**: half of every matrix is zero, everything else is as it was
- **reload**: transformers reads the result, with the same logits, to the bit"""

NOTES = """## What is not pruned

Embeddings, output heads, norms, routers and the gates of shared experts, depthwise convolutions (unless
`--set model.depthwise=true`), everything outside the blocks, and everything but the language part of a vision-language
model (LLaVA, Qwen2-VL, Qwen3-VL-MoE, Gemma 3 and Mistral 3 are tried: tests/models/test_vision_language.py). `obsprune
inspect MODEL` lists it for any checkpoint.

## What is refused

Encoder-decoder models; quantised checkpoints; mixtures whose experts transformers gives no way to watch (Llama 4, DBRX,
JetMoE); models that run a block twice in one forward."""
