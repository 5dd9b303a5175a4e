"""The paper's networks, what they are trained on and how: sizes, augmentation, folders of images, and small runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from obsprune.errors import InputError
from obsprune.progress import Silent
from obsprune.studies import recipes
from obsprune.studies.directional.bench import falling
from obsprune.studies.directional.convolutional import NETWORKS
from obsprune.studies.directional.images import Images, share
from obsprune.studies.directional.photographs import PADDING, VIEWS, Album, padded, scaled
from obsprune.studies.material import Material
from obsprune.studies.recipes import Experiment, PaperRecipe

OURS = ["vgg16-cifar10", "wrn28x10-cifar100", "resnet50-imagenet"]
SMALL = Images(network="wrn28x10", width=1, size=16, epochs=3, batch=8, runs=[[0.02, 0.6]], workers=0)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """photos/ with two classes of three and one images of several sizes: cats are dark, dogs light."""
    random = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 1)):
        for kind, grey in (("dog", 200), ("cat", 20)):
            folder = tmp_path / "photos" / part / kind
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(grey, grey + 40, (20 + number, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "width", "classes", "count"),
    [
        ("vgg16", 64, 10, 14_714_688 + 2 * (512 * 512 + 512) + 5130),
        ("vgg16-bn", 64, 10, 14_714_688 + 2 * 4224 + 2 * (512 * 512 + 512) + 5130),
        ("wrn28x10", 10, 100, 36_546_980),  # as the authors' logs count
        ("resnet50", 64, 1000, 25_557_032),
    ],
)
def test_the_papers_sizes(name: str, width: int, classes: int, count: int) -> None:
    with torch.device("meta"):
        network = NETWORKS[name](classes, width)
    assert sum(one.numel() for one in network.parameters()) == count


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_logits_and_every_weight_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name](7, 2)
    z_BK = network(torch.randn(4, 3, 32, 32))
    assert z_BK.shape == (4, 7)
    z_BK.square().sum().backward()
    assert all(one.grad is not None for one in network.parameters())


@torch.no_grad()
def test_without_batch_norm_the_signal_lives() -> None:
    torch.manual_seed(0)
    convolutions, x = NETWORKS["vgg16"](10, 16)[:31], torch.randn(8, 3, 32, 32)  # type: ignore[index]
    ours = float(convolutions(x).std(0).mean())  # between images
    for layer in convolutions:
        if isinstance(layer, torch.nn.Conv2d):
            layer.reset_parameters()
    assert ours > 100 * float(convolutions(x).std(0).mean())


@pytest.mark.parametrize("name", ["vgg16-cifar10", "wrn28x10-cifar100"])
def test_the_schedule_of_the_recipes_is_the_authors(name: str) -> None:
    settings = PaperRecipe.read(recipes.root() / "directional-pruning" / f"{name}.yaml").settings
    for epoch in range(settings["epochs"]):
        assert share(settings["schedule"], epoch) == pytest.approx(falling(epoch / settings["epochs"]))


def test_steps_and_ends_of_a_schedule() -> None:
    assert [share([[140, 1], [140, 0.1]], epoch) for epoch in (0, 139, 140, 149)] == [1, 1, 0.1, 0.1]
    assert [share([[2, 0.5], [4, 1]], epoch) for epoch in (0, 2, 3, 4, 9)] == [0.5, 0.5, 0.75, 1, 1]


def crops(x_CHW: Tensor) -> list[Tensor]:
    around = torch.zeros(3, 8 + 2 * PADDING, 8 + 2 * PADDING, dtype=torch.uint8)
    around[:, PADDING:-PADDING, PADDING:-PADDING] = x_CHW
    found = [around[:, y : y + 8, x : x + 8] for y in range(2 * PADDING + 1) for x in range(2 * PADDING + 1)]
    return found + [one.flip(2) for one in found]


def test_padded_crops_are_those_of_brute_force() -> None:
    x_CHW = torch.randint(1, 255, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    known, seen = crops(x_CHW), set()
    for seed in range(400):
        made = padded(8, x_CHW, torch.Generator().manual_seed(seed))
        seen.add(next(place for place, one in enumerate(known) if torch.equal(one, made)))
    assert len(seen) > 120  # of 162
    assert torch.equal(padded(8, x_CHW, None), x_CHW)


def test_scaled_crops_are_parts_of_the_image_in_its_range() -> None:
    ramp = torch.linspace(40, 200, 60).to(torch.uint8).expand(3, 50, 60)
    made = [scaled(16, ramp, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert {one.shape for one in made} == {(3, 16, 16)} and {one.dtype for one in made} == {torch.uint8}
    assert min(int(one.min()) for one in made) >= 40 and max(int(one.max()) for one in made) <= 200
    rising = [bool((one[0, 0].int().diff() >= 0).all()) for one in made]
    assert 10 < sum(rising) < 40  # the others are mirrored
    middle = scaled(16, ramp, None)[0, 0].float()
    assert float(middle.mean()) == pytest.approx(float(ramp.float().mean()), abs=1.5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1), (7, 300)])
@pytest.mark.parametrize("view", VIEWS)
def test_every_image_becomes_one_of_the_size(view: str, shape: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 9, dtype=torch.uint8)
    for random in (None, *(torch.Generator().manual_seed(seed) for seed in range(20))):
        assert VIEWS[view](8, image, random).shape == (3, 8, 8)


@pytest.mark.parametrize("view", VIEWS)
def test_a_tree_is_read_with_its_classes(tree: Path, view: str) -> None:
    album = Album.read(Material(tree), "photos", partial(VIEWS[view], 16))
    assert (album.classes, len(album.train), len(album.test)) == (2, 6, 2)
    seen = 0
    for images, classes in album.train.epoch(torch.Generator().manual_seed(0), 4, 0):
        seen += len(images)
        assert images.shape[1:] == (3, 16, 16)
        assert ((images.amax((1, 2, 3)) > 100).long() == classes).all()  # cat is 0 and dark, dog 1 and light
    assert seen == 6
    assert torch.cat([classes for _, classes in album.test.plain(1, 0)]).tolist() == [0, 1]


def test_workers_change_no_image(tree: Path) -> None:
    part = Album.read(Material(tree), "photos", partial(scaled, 16)).train
    alone, helped = (list(part.epoch(torch.Generator().manual_seed(3), 4, workers)) for workers in (0, 2))
    for (images, classes), (others, same) in zip(alone, helped, strict=True):
        assert torch.equal(images, others) and torch.equal(classes, same)


def test_data_is_asked_for_before_the_work(tree: Path) -> None:
    study = replace(SMALL, data="cifar10")
    with pytest.raises(InputError, match=r"no folder of data was named; --data DIR, where DIR/cifar10/train/CLASS"):
        study.require(Material())
    with pytest.raises(InputError, match="has no cifar10/"):
        study.require(Material(tree))
    (tree / "photos" / "val" / "dog" / "0.png").unlink()
    with pytest.raises(InputError, match=r"2 classes in train/ and of 1 in val/"):
        replace(SMALL, data="photos").require(Material(tree))


def test_a_damaged_image_is_named(tree: Path) -> None:
    (tree / "photos" / "val" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"dog/0\.png cannot be read"):
        replace(SMALL, data="photos", epochs=1, runs=[]).run(Material(tree), Silent())


@pytest.mark.parametrize("change", [{"network": "vgg"}, {"augment": "pad"}, {"runs": [[1]]}, {"schedule": []}])
def test_settings_that_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match="settings"):
        replace(SMALL, **change).require(Material())  # type: ignore[arg-type]


def test_a_small_run_learns_prunes_and_repeats() -> None:
    first = SMALL.run(Material(), Silent())
    assert first.values["sgd.test"] == 100
    assert 0.02 < first.values["c0.02.mu0.6.zeros"] < 0.9
    before = torch.get_rng_state()
    again = SMALL.run(Material(), Silent())
    assert again.values == first.values and again.tables == first.tables
    assert torch.equal(torch.get_rng_state(), before)


def test_grda_without_a_threshold_is_sgd_on_the_same_batches() -> None:
    values = (
        replace(SMALL, network="vgg16", width=4, size=32, epochs=2, runs=[[0.0, 0.6]]).run(Material(), Silent()).values
    )
    assert values["c0.mu0.6.loss"] == values["sgd.loss"] and values["c0.mu0.6.zeros"] == 0


@pytest.mark.parametrize("name", OURS)
def test_smoke(name: str, tmp_path: Path) -> None:
    path = recipes.root() / "directional-pruning" / f"{name}.yaml"
    results = Experiment.prepare(path, tmp_path / "out", Material(), smoke=True).run(Silent())
    assert any(key.endswith(".zeros") and value > 0 for key, value in results["values"].items())
    expected = PaperRecipe.read(path)
    runs = {f"c{c:g}.mu{mu:g}" for c, mu in expected.settings["runs"]}
    assert {one.rpartition(".")[0] for one in expected.expected} - {"sgd"} == runs
