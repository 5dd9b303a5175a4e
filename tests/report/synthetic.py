"""A report as a large run would write it, with made-up numbers that are always the same."""

from __future__ import annotations

import math
import random
from typing import Any

from obsprune.recipe import make_recipe

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
"""Of Llama-2-7B."""


def synthetic_report(depth: int = 32, rounds: int = 3) -> dict[str, Any]:
    """Of a run on a model of this depth, 7 matrices a block: 224 for Llama-2-7B."""
    made = random.Random(0)
    matrices = [_matrix(made, block, kind) for block in range(depth) for kind in SHAPES]
    zeros, weights = sum(one["zeros"] for one in matrices), sum(math.prod(one["shape"]) for one in matrices)
    recipe = make_recipe(
        {"model": {"name": "example/Made-up-7b"}, "data": {"nsamples": 128, "heldout": 16}, "sparsity": 0.5},
        {"pattern": "unstructured", "iters": rounds, "correction": 0.75, "evaluation": ["wikitext2"]},
    ).tree()
    return {
        "schema": 1,
        "output": "obsprune-out/Made-up-7b-sparsegpt-50-iters3",
        "command": "obsprune prune example/Made-up-7b --solver sparsegpt --iters 3 --eval wikitext2",
        "recipe": recipe,
        "model": {
            "source": "example/Made-up-7b",
            "base": {"id": "example/Made-up-7b", "revision": "0123456789abcdef0123456789abcdef01234567"},
            "licence": {"license": "apache-2.0"},
            "type": "llama",
            "kind": "causal language model",
            "parameters": weights + 2 * 32000 * 4096,
            "compute_dtype": "bfloat16",
            "device": "cuda",
        },
        "data": _data(rounds),
        "sparsity": {"asked": 0.5, "pattern": "unstructured", "reached": zeros / weights, "zeros": zeros,
                     "weights": weights},
        "allocation": {"rule": "uniform", "tried": {}},
        "matching": [],
        "coverage": [],
        "evaluation": {"wikitext2": _scores()},
        "rounds": [_round(number, rounds) for number in range(1, rounds + 1)],
        "matrices": matrices,
        "skipped": {"model.embed_tokens": "embedding", "lm_head": "output head"},
        "warnings": ["these numbers are made up"],
        "seconds": {"total": 412.0, "allocation": 0.0, "pruning": 171.5, "rounds": 181.0, "evaluation": 38.25},
        "memory": {"host_bytes": 9_400_000_000, "device_bytes": 31_200_000_000},
        "peak_memory_bytes": {"host": 21_000_000_000, "device": 31_200_000_000},
        "versions": {"obsprune": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0",
                     "safetensors": "0.8.0", "tokenizers": "0.23.3", "datasets": "5.2.0"},
        "good_for": "Plain dense safetensors with exact zeros.",
    }  # fmt: skip


def _matrix(made: random.Random, block: int, kind: str) -> dict[str, Any]:
    rows, columns = SHAPES[kind]
    error = 0.004 * (1 + block / 8) * math.exp(made.gauss(0, 0.6))
    zeros = rows * columns // 2
    name = f"model.layers.{block}"
    return {
        "block": name,
        "name": f"{name}.{kind}",
        "shape": [rows, columns],
        "zeros": zeros,
        "sparsity": zeros / (rows * columns),
        "loss": error * 1e6,
        "error": error,
        "damping": 0.01 if made.random() > 0.01 else 0.1,
        "tokens": 262_144,
        "seconds": 0.4 + 0.1 * made.random(),
        "correction": 0.0,
        "residual": kind in ("self_attn.o_proj", "mlp.down_proj"),
        "dtype": "bfloat16",
    }


def _data(rounds: int) -> dict[str, Any]:
    further = {"seen": 128 * rounds, "fresh": [True] * rounds, "sha256": ["c" * 64] * (rounds - 1)}
    return {
        "dataset": "c4",
        "unit": "sequences",
        "sequences": 128,
        "seqlen": 2048,
        "tokens": 262_144,
        "heldout": 16,
        "sha256": "a" * 64,
        "heldout_sha256": "b" * 64,
        **({"rounds": further} if rounds > 1 else {}),
    }


def _scores() -> dict[str, Any]:
    def one(perplexity: float) -> dict[str, Any]:
        return {"metric": "perplexity", "perplexity": perplexity, "nll": math.log(perplexity), "corpus": "wikitext2",
                "predicted_tokens": 341_303, "sequences": 166, "seqlen": 2048, "tokens": 341_469, "stride": 2048,
                "sha256": "d" * 64, "seconds": 19.1}  # fmt: skip

    tests = {"nll": {"difference": 0.09, "stderr": 0.004, "p": 1e-9, "items": 166}}
    return {"dense": one(5.472), "pruned": one(5.988), "ratio": 5.988 / 5.472, "paired": tests}


def _round(number: int, rounds: int) -> dict[str, Any]:
    perplexity = 6.4 - 0.25 * number
    further = {"step": 0.5, "rate": 1e-5, "moved": 0.012 / number} if number > 1 else {}
    return {"round": number, "heldout_kl": 0.12 / number, "told": {"perplexity": perplexity, "agreement": 0.85},
            "seconds": 171.5 if number == 1 else 90.5, "kept": True, **further, "best": number == rounds,
            "fresh": True}  # fmt: skip
