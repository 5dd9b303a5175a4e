"""The embedded demo model: small, trained, and worse off under magnitude pruning than under SparseGPT."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from obsprune.eval_pipeline import evaluate_checkpoint
from obsprune.models.corpora import Reading, open_corpus, read_text
from obsprune.models.load import load
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe

DEMO = Path(str(files("obsprune") / "demo"))
TASK = f"text={DEMO / 'evaluation.txt'}"


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 3e6


def test_its_texts_share_no_story() -> None:
    calibration, evaluation = (set(read_text(DEMO / f"{name}.txt")) for name in ("calibration", "evaluation"))
    assert len(evaluation) > 50 and not calibration & evaluation


def test_it_is_far_better_than_a_unigram_model() -> None:
    model = load("demo")
    reading = Reading(lambda: model.processor, model.classes, 256)
    rows = open_corpus(TASK.removeprefix("text="), reading).every().ids
    counts = torch.bincount(rows.flatten(), minlength=model.classes).double()
    share = counts / counts.sum()
    unigram = math.exp(-float((share[share > 0] * share[share > 0].log()).sum()))
    score = evaluate_checkpoint("demo", [TASK], Silent())["tasks"][TASK]["model"]
    assert score["perplexity"] < unigram / 10


@pytest.mark.slow
def test_magnitude_hurts_more_than_sparsegpt(tmp_path: Path) -> None:
    def excess(solver: str) -> float:
        recipe = make_recipe({"model": {"name": "demo"}, "solver": {"name": solver}, "evaluation": [TASK]})
        score = prune(recipe, tmp_path / solver, Silent())["evaluation"][TASK]
        return float(score["pruned"]["perplexity"] - score["dense"]["perplexity"])

    assert excess("magnitude") > 1.5 * excess("sparsegpt") > 0
