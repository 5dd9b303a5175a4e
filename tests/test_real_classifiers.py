"""Real image classifiers on a sample of ImageNet: probably images they were trained on, so only differences count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from obsprune.pipeline import prune
from obsprune.presets import layered
from obsprune.progress import Silent
from obsprune.recipe import make_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def sample(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(images to calibrate on, others to evaluate on): two of every five, and the other three."""
    folder = assets / "imagenet-sample"
    rows = (folder / "labels.tsv").read_text(encoding="utf-8").splitlines()
    parts: dict[bool, list[str]] = {True: [], False: []}
    for index, row in enumerate(rows):
        parts[index % 5 < 2].append(f"{folder}/{row}")
    made = tmp_path_factory.mktemp("sample")
    for name, lines in (("calibration", parts[True]), ("evaluation", parts[False])):
        (made / f"{name}.tsv").write_text("\n".join(lines), encoding="utf-8")
    return f"imagenet={made / 'calibration.tsv'}", f"imagenet={made / 'evaluation.tsv'}"


def pruned(model: Path, sample: tuple[str, str], output: Path, preset: str | None = None, **settings: Any) -> Any:
    """The report of a run."""
    calibration, evaluation = sample
    tree = {
        "model": {"name": str(model)},
        "data": {"dataset": calibration, "nsamples": 336, "heldout": 64},
        "evaluation": [evaluation],
    }
    return prune(make_recipe(*layered(preset, {}, tree, settings)), output, Silent())


def scores(report: Any) -> Any:
    return next(iter(report["evaluation"].values()))


def test_deit_tiny_at_half(assets: Path, sample: tuple[str, str], tmp_path: Path) -> None:
    """Measured: dense 79.0, SparseGPT 68.3, balanced 74."""
    deit = assets / "deit-tiny"
    plain = scores(pruned(deit, sample, tmp_path / "plain", solver={"name": "sparsegpt"}, sparsity=0.5))
    better = scores(pruned(deit, sample, tmp_path / "balanced", "balanced", sparsity=0.5))
    assert plain["dense"]["images"] == 600
    assert plain["dense"]["top1"] == pytest.approx(79.0, abs=0.4)
    assert 64 <= plain["pruned"]["top1"] <= 72
    assert better["pruned"]["top1"] >= plain["pruned"]["top1"] + 3
    assert better["pruned"]["cross_entropy"] < plain["pruned"]["cross_entropy"]
    assert plain["paired"]["top1"]["difference"] == pytest.approx(plain["pruned"]["top1"] - plain["dense"]["top1"])
    assert plain["paired"]["top1"]["p"] < 1e-4


def test_rounds_bring_deit_tiny_closer(assets: Path, sample: tuple[str, str], tmp_path: Path) -> None:
    """One round on 128 images takes 16 % away; two on 336 images 40 % (docs/classifiers.md)."""
    data = {"dataset": sample[0], "nsamples": 128, "heldout": 64}
    settings = {"solver": {"name": "sparsegpt"}, "sparsity": 0.7, "iters": 2, "data": data, "evaluation": ["none"]}
    first, second = pruned(assets / "deit-tiny", sample, tmp_path / "out", **settings)["rounds"]
    assert second["heldout_kl"] < 0.9 * first["heldout_kl"]


def test_new_statistics_for_the_norms_of_mobilenet(assets: Path, sample: tuple[str, str], tmp_path: Path) -> None:
    """Measured at 70 %: 0.7 without, 21 with."""
    model, settings = assets / "mobilenet-v1-050-160", {"solver": {"name": "sparsegpt"}, "sparsity": 0.7}
    without = scores(pruned(model, sample, tmp_path / "without", **settings))
    norms = scores(pruned(model, sample, tmp_path / "with", engine={"reestimate_norms": True}, **settings))
    assert without["dense"]["top1"] == pytest.approx(64.5, abs=0.4)  # 1,001 classes, the first of them background
    assert norms["pruned"]["top1"] > without["pruned"]["top1"] + 15
