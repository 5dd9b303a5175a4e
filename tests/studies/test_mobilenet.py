"""The studies on MobileNetV1: which images, new statistics of norms, paired differences, what a stopped run keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from obsprune.engine.retrained import labelled, trainee_of
from obsprune.errors import InputError
from obsprune.models.kinds import Wish
from obsprune.models.load import Model, load
from obsprune.models.shapes import SHAPES
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import Recipe
from obsprune.studies import mobilenet_rounds
from obsprune.studies.material import Material
from obsprune.studies.mobilenet import Score, score
from obsprune.studies.mobilenet_compared import NORMS, differences, figures, tables, values, with_norms
from obsprune.studies.mobilenet_images import copied, two_parts
from obsprune.studies.mobilenet_norms import pruned
from obsprune.studies.mobilenet_rounds import ENGINE, RANKED, MobilenetRounds, told

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    SHAPES["mobilenet-v1"].tiny(folder)
    return folder


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load(str(tiny))


@pytest.fixture
def source(tiny: Path) -> Path:
    return tiny / "labels.tsv"


def buffers(model: Model) -> dict[str, Tensor]:
    """All that the loaded blocks are."""
    return {
        f"{block.name}.{name}": x.clone() for block in model.blocks for name, x in block.module.state_dict().items()
    }


def test_one_source_is_divided(model: Model, source: Path) -> None:
    first, second = two_parts(model, (source, source), (1000, 1000))
    assert first.places == [place for place in range(40) if place % 5 in (0, 1)]
    assert second.places == [place for place in range(40) if place % 5 in (2, 3, 4)]
    first, second = two_parts(model, (source, source), (4, 6))
    assert first.places == [0, 10, 20, 30]
    assert second.places == [2, 8, 14, 22, 28, 34]


def test_two_sources_are_taken_as_they_are(model: Model, source: Path, tmp_path: Path) -> None:
    flat = copied(two_parts(model, (source, source), (8, 8))[1], tmp_path / "others")
    first, second = two_parts(model, (source, flat), (20, 4))
    assert first.places == list(range(0, 40, 2))
    assert second.places == [0, 2, 4, 6]


def test_copied_images_are_the_same(model: Model, source: Path, tmp_path: Path) -> None:
    part, _ = two_parts(model, (source, source), (5, 1))
    again, _ = model.open(Wish(f"imagenet={copied(part, tmp_path / 'images')}", 0))
    drawn = again.sample(5, torch.Generator())
    assert len(drawn) == 5
    assert {x.numpy().tobytes() for x in part.batches(1, CPU)[0]["pixel_values"]} <= {
        x.numpy().tobytes() for batch in drawn.batches(1, CPU) for x in batch["pixel_values"]
    }


def test_renewed_norms_are_the_engine_s(model: Model, source: Path, tmp_path: Path) -> None:
    seen, others = two_parts(model, (source, source), (16, 8))
    images = copied(seen, tmp_path / "images")
    recipe = MobilenetRounds().recipe("magnitude-layers", 0.6, True, model.directory, images, 16)
    prune(recipe, tmp_path / "out", Silent())
    result = load(str(tmp_path / "out"))
    with result.loaded():
        expected = buffers(result)
        w_P = torch.cat([matrix.read().flatten() for matrix in result.matrices])
        wanted = score(trainee_of(result, torch.float32, False), labelled(others, 4, CPU))
    with model.loaded(), torch.no_grad():
        before, trainee = buffers(model), trainee_of(model, torch.float32, False)
        with pruned(model, trainee, w_P, labelled(seen, 16, CPU)):
            found = buffers(model)
            scored = score(trainee, labelled(others, 4, CPU))
        with pruned(model, trainee, w_P, []):
            plain = buffers(model)
        after = buffers(model)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.allclose(found[name].float(), x.float(), rtol=1e-4, atol=1e-5), name
        assert torch.equal(after[name], before[name])
        assert torch.equal(plain[name], before[name] if "running" in name else x), name
    assert any(name.endswith("running_var") and not torch.equal(x, before[name]) for name, x in found.items())
    assert scored.loss == pytest.approx(wanted.loss, rel=1e-4)


def test_what_is_asked_of_the_engine() -> None:
    model, images = Path("model"), Path("images")
    study = MobilenetRounds(heldout=3, iters=5, tuned=2, skip=["x"])
    asked = {form: study.recipe(form, 0.5, False, model, images, 10) for form in ENGINE}
    assert {form: (one.data.nsamples, one.data.heldout, one.iters) for form, one in asked.items()} == {
        "magnitude-layers": (10, 0, 1),
        "sparsegpt": (10, 0, 1),
        "iobs": (7, 3, 5),
        "iobs-tuned": (7, 3, 2),
    }
    assert (asked["iobs"].rounds.tune, asked["iobs-tuned"].rounds.tune) == ("none", "masked")
    assert all(one.solver["name"] == "sparsegpt" for form, one in asked.items() if form != "magnitude-layers")
    assert not asked["iobs"].engine.reestimate_norms
    assert study.recipe("iobs", 0.5, True, model, images, 10).engine.reestimate_norms


def test_a_stopped_run_goes_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished is not done again, unless a setting is another: scores tell by their loss what was asked."""
    material, labels = Material(tiny.parent, work=tmp_path / "unfinished"), f"{tiny.name}/labels.tsv"
    study = MobilenetRounds(model=tiny.name, calibration_from=labels, evaluation_from=labels, sparsities=[0.5],
                            calibration=6, forms=["sparsegpt"])  # fmt: skip
    asked: list[str] = []
    stops = [3, 6, 9]

    def ranked(study: MobilenetRounds, *_: Any) -> dict[str, Any]:
        asked.append("ranked")
        names = ("dense", *(name + suffix for name in RANKED for suffix in NORMS))
        return {name: {0.0 if name == "dense" else 0.5: told(scored(study.calibration))} for name in names}

    def pruned(recipe: Recipe, output: Path, *_: Any) -> dict[str, Any]:
        asked.append(output.name.rpartition("-")[0])
        if len(asked) in stops:
            raise KeyboardInterrupt
        images = len(list(Path(recipe.data.dataset.partition("=")[2]).iterdir()))
        assert images == recipe.data.nsamples
        monkeypatch.setattr(mobilenet_rounds, "score_of", lambda *_: scored(images))
        return {"rounds": []}

    monkeypatch.setattr(MobilenetRounds, "_ranked", ranked)
    monkeypatch.setattr(mobilenet_rounds, "prune", pruned)
    for interrupted in (study, replace(study, damping=1.0), replace(study, calibration=5)):
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(material, Silent())
    found = study.run(material, Silent()).values
    assert asked == [*["ranked", "sparsegpt.0.5", "sparsegpt.norms.0.5"] * 3, "sparsegpt.norms.0.5"]
    assert {value for name, value in found.items() if ".loss." in name} == {6.0}
    assert not (tmp_path / "unfinished").exists()
    stops[:] = [len(asked) + 2]
    with pytest.raises(KeyboardInterrupt):
        replace(study, shape="mobilenet-v1", tiny=True).run(material, Silent())
    assert not (tmp_path / "unfinished").exists()  # what is made anew cannot be gone on with


def test_what_decides_what_is_found(model: Model, source: Path) -> None:
    study, (first, second) = MobilenetRounds(), two_parts(model, (source, source), (4, 4))
    other = replace(second, layout=replace(second.layout, classes=second.layout.classes[::-1]))
    abouts = [study._about(model, *parts) for parts in ((first, second), (second, first), (first, other))]
    assert not any(one == two for one, two in combinations(abouts, 2))
    assert study._about(model, first, second) == abouts[0]


def scored(loss: float) -> Score:
    return Score(torch.tensor([True]), torch.tensor([float(loss)]))


def some(right: list[int]) -> Score:
    return Score(torch.tensor(right, dtype=torch.bool), torch.tensor([1.0 - one for one in right]))


FORMS = ("iobs", "iobs-tuned", "cbs", "woodfisher", "sparsegpt")
FOUND = {"dense": {0.0: some([1, 1, 1, 1])}} | {
    f"{name}{suffix}": {0.5: some(right), 0.7: some([0, 0, 0, 0])}
    for suffix, extra in (("", 0), (".norms", 1))
    for name, right in zip(
        FORMS, ([1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, extra], [0, 0, 0, 0], [1, 1, 0, 0]), strict=True
    )
}


def test_differences_are_paired_by_image() -> None:
    one = differences(FOUND, "iobs", "cbs")
    assert list(one) == [0.5, 0.7]
    deviations = [d - 50.0 for d in (0, 100, 100, 0)]
    assert one[0.5]["difference"] == 50.0
    assert one[0.5]["stderr"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 3 / 4))
    assert one[0.7]["p"] == 1.0


def test_values_and_tables() -> None:
    told = values(FOUND)
    assert told["iobs.0.5"] == 75.0
    assert told["iobs.loss.0.5"] == 0.25
    assert told["cbs.0.5"] == 25.0
    assert told["cbs.norms.0.5"] == 50.0
    assert told["iobs-cbs.0.5"] == 50.0
    assert told["iobs-cbs.norms.0.5"] == 25.0
    assert told["iobs-tuned-sparsegpt.0.5"] == 50.0
    assert told["iobs-cbs.stderr.0.7"] == 0.0
    fewer = values({name: by for name, by in FOUND.items() if "sparsegpt" not in name})  # forms may be left out
    assert fewer == {name: value for name, value in told.items() if "sparsegpt" not in name}
    rounds = [{"round": 1, "best": False, "heldout_kl": 2.0}, {"round": 2, "best": True, "heldout_kl": 1.5}]
    made = tables(FOUND, {"iobs.norms": {0.5: rounds, 0.7: [*rounds[:1], rounds[1] | {"round": 3}]}})
    top1, loss, renewed, _, ahead, course = made
    assert top1.rows[0] == ["iobs", 75.0, 0.0]
    assert "dense 100; norms as they were" in top1.title
    assert loss.rows[2][0] == "cbs"
    assert renewed.rows[2] == ["cbs", 50.0, 0.0]
    assert ahead.rows[0] == ["iobs − cbs", "norms as they were", "+50.0 ± 28.9", "+0.0 ± 0.0"]
    assert course.rows[0][:3] == ["iobs", "new statistics of the norms", "2 of 2; 2 → 1.5"]
    assert [len(panel.lines) for panel in figures(FOUND)[0].panels] == [5, 5]  # type: ignore[attr-defined]
    assert set(with_norms(FOUND, "")) == {"dense", *FORMS}


def test_what_is_missing_is_told_before_the_work(assets: Path, tmp_path: Path) -> None:
    MobilenetRounds().require(Material(assets))
    MobilenetRounds(tiny=True).require(Material())
    MobilenetRounds(model="google/mobilenet_v1_1.0_224").require(Material(assets))  # it will be downloaded
    with pytest.raises(InputError, match="a source of images is needed"):
        MobilenetRounds(calibration_from="imagenet/train").require(Material(assets))
    with pytest.raises(InputError, match="the model is needed"):
        MobilenetRounds(model="mobilenet-v9").require(Material(assets))
    with pytest.raises(InputError, match="seeds is 2"):
        replace(MobilenetRounds(), seeds=2).require(Material(assets))
