from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from obsprune.core.obs import saliency
from obsprune.errors import InputError
from obsprune.progress import Silent
from obsprune.studies.cases import INPUTS, PROBLEMS, Cases, all_cases, encoded
from obsprune.studies.material import Material
from obsprune.studies.monks import CRITERIA, Monks
from obsprune.studies.nets import Nets, Shape, Task, at, gauss_newton, path, prune, train

TINY = {"seeds": 2, "hidden": 1, "steps": 40, "retraining": 3, "decay": 3e-3, "alpha": 3e-3}
OBS, _, OBD, MAGNITUDE, PLANES = CRITERIA


def drawn(seed: int) -> Cases:
    """The noisy training cases of MONK-3."""
    return PROBLEMS[3].training.cases(PROBLEMS[3].holds, Material(), seed)


@pytest.fixture(scope="module")
def trained() -> tuple[Task, Nets]:
    shape = Shape(17, 2)
    cases, labels = zip(*(drawn(seed) for seed in range(2)), strict=True)
    task = Task(shape, torch.stack([encoded(one) for one in cases]), torch.stack(labels).double(), 3e-3)
    return task, train(task, Nets.whole(torch.stack([shape.start(seed, 0.5) for seed in range(2)])), 120)


@pytest.mark.parametrize(("problem", "count"), [(1, 216), (2, 142), (3, 228)])
def test_rules_hold_for_as_many_cases_as_published(problem: int, count: int) -> None:
    assert int(PROBLEMS[problem].holds(all_cases()).sum()) == count


def test_encoding_is_one_of_each_attribute() -> None:
    x = encoded(all_cases())
    assert x.shape == (432, len(INPUTS)) and len(INPUTS) == 17
    assert bool((x.sum(1) == 6).all()) and len(x.unique(dim=0)) == 432
    assert [name for name, on in zip(INPUTS, x[-1], strict=True) if on] == [
        "a1=3",
        "a2=3",
        "a3=2",
        "a4=3",
        "a5=4",
        "a6=2",
    ]


def test_drawn_cases_are_all_different_and_some_labels_wrong() -> None:
    cases, labels = drawn(0)
    assert len(cases.unique(dim=0)) == 122
    assert int((labels != PROBLEMS[3].holds(cases)).sum()) == 6
    again, other = drawn(0), drawn(1)
    assert torch.equal(again[0], cases) and torch.equal(again[1], labels) and not torch.equal(other[0], cases)


def test_the_file_of_monk1_follows_the_rule(assets: Path) -> None:
    data = Material(assets).monk1()
    assert (len(data.x), len(data.x_test)) == (124, 432)
    assert torch.equal(PROBLEMS[1].holds(data.x), data.y.bool()) and torch.equal(
        PROBLEMS[1].holds(data.x_test), data.y_test.bool()
    )
    assert len(data.x_test.unique(dim=0)) == 432


@pytest.mark.parametrize("line", ["1 1 1 1", "1 1 1 x 1 1 1 data_1", "1 4 1 1 1 1 1 data_1", "1 0 1 1 1 1 1 data_1"])
def test_a_damaged_file_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "monks").mkdir()
    for part in ("train", "test"):
        (tmp_path / "monks" / f"monks-1.{part}").write_text(f"class a1 a2\n 1 1 1 1 1 3 1 data_5\n {line}\n")
    with pytest.raises(InputError, match=r"monks-1\.train"):
        Material(tmp_path).monk1()


def test_weights_are_as_many_as_published() -> None:
    assert (Shape(17, 3).weights, Shape(17, 2).weights, Shape(2, 2).weights) == (58, 39, 9)
    assert sorted(chain.from_iterable(Shape(17, 3).units)) == list(range(58))


def test_output_is_the_nets() -> None:
    shape = Shape(2, 2, "tanh")
    w, x = torch.arange(9.0, dtype=torch.float64) / 10, torch.tensor([1.0, -2.0], dtype=torch.float64)
    units = [torch.tanh(w[2 * u] * x[0] + w[2 * u + 1] * x[1] + w[4 + u]) for u in range(2)]
    torch.testing.assert_close(shape.output(w, x), torch.sigmoid(w[6] * units[0] + w[7] * units[1] + w[8]))


def test_training_ends_in_a_minimum(trained: tuple[Task, Nets]) -> None:
    task, nets = trained
    w = nets.w.clone().requires_grad_()
    (slope,) = torch.autograd.grad(task.objective(w).sum(), w)
    assert float(slope.norm(dim=1).max()) < 1e-4
    torch.testing.assert_close(task.slope(nets.w), slope.norm(dim=1))


def test_first_choice_is_the_least_saliency(trained: tuple[Task, Nets]) -> None:
    task, nets = trained
    least = saliency(nets.w, gauss_newton(task, nets, 3e-3)).argmin(1)
    assert torch.equal(OBS.remove(task, nets, 3e-3).free.diagonal(dim1=1, dim2=2).argmin(1), least)


@pytest.mark.parametrize("criterion", CRITERIA[:4], ids=lambda one: one.name)
def test_deleted_weights_stay_zero(trained: tuple[Task, Nets], criterion: object) -> None:
    task, nets = trained
    gone = torch.zeros_like(nets.w, dtype=torch.bool)
    for step, one in enumerate(path(criterion, task, nets, 3e-3)):  # type: ignore[arg-type]
        assert one.left.tolist() == [39 - step] * 2
        assert bool((one.w[gone] == 0).all())
        gone = one.free.diagonal(dim1=1, dim2=2) == 0
        assert int(gone.sum()) == 2 * step
    retrained = train(task, one, 5)
    assert bool((retrained.w[gone] == 0).all())


def test_planes_held_stay_held(trained: tuple[Task, Nets]) -> None:
    task, nets = trained
    way = path(PLANES, task, nets, 3e-3)
    middle = train(task, way[20], 5)
    assert way[20].left.tolist() == [19, 19]
    assert float((middle.w - (middle.free @ middle.w[:, :, None])[:, :, 0]).abs().max()) < 1e-12
    assert int((middle.w.abs() > 1e-9).sum(1).max()) > 19  # more weights than degrees of freedom: some are shared


def test_magnitude_and_obd_only_set_to_zero(trained: tuple[Task, Nets]) -> None:
    task, nets = trained
    for criterion in (MAGNITUDE, OBD):
        after = criterion.remove(task, nets, 3e-3)
        assert torch.equal(after.w[after.w != 0], nets.w[after.w != 0]) and int((after.w == 0).sum()) == 2


def test_pruning_keeps_the_training_accuracy(trained: tuple[Task, Nets]) -> None:
    task, nets = trained
    floor = task.accuracy(nets.w)
    alone = prune(OBS, task, nets, floor, 3e-3, 0)
    helped = prune(OBS, task, nets, floor, 3e-3, 10)
    assert bool((task.accuracy(alone.w) >= floor).all()) and bool((task.accuracy(helped.w) >= floor).all())
    assert bool((helped.left <= alone.left).all()) and bool((alone.left < 39).all())
    worse = OBS.remove(task, alone, 3e-3)
    assert bool((task.accuracy(worse.w) < floor).all())  # it stopped because it had to
    picked = at(path(OBS, task, nets, 3e-3), 39 - alone.left)
    assert torch.equal(picked.w, alone.w)


def test_same_settings_same_values() -> None:
    first, second = (Monks(problem=3, **TINY).run(Material(), Silent()) for _ in range(2))  # type: ignore[arg-type]
    assert dict(first.values) == dict(second.values) and first.tables == second.tables
    assert first.values["dense.weights"] == 20 and first.values["obs.alone.best"] < 20
    assert first.values["hessian.off_diagonal"] > 0.5


@pytest.mark.parametrize(
    ("settings", "words"), [({"problem": 4}, "1, 2 and 3"), ({"trained": 101.0}, "settings.trained")]
)
def test_settings_that_cannot_be(settings: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Monks(**{**TINY, "problem": 2, **settings}).run(Material(), Silent())  # type: ignore[arg-type]


def test_monk1_needs_its_file() -> None:
    with pytest.raises(InputError, match=r"monks-1\.train"):
        Monks(**TINY).run(Material(), Silent())  # type: ignore[arg-type]
