"""Sparse recovery: the algorithms against slow definitions, one consistent step, and what a small run gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from obsprune.core.iobs import top_k
from obsprune.errors import InputError
from obsprune.progress import Silent
from obsprune.studies.base import Outcome
from obsprune.studies.material import Material
from obsprune.studies.recovery import SparseRecovery
from obsprune.studies.sensing import (
    KINDS,
    PRIORS,
    Iht,
    MnistPrior,
    Problem,
    Run,
    Stochastic,
    draw_problem,
    follow,
)

SMALL = {"seeds": 2, "steps": 30, "consistent_steps": 10, "dampings": [10.0], "marks": [0, 9, 29], "every": 10}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(seed: int) -> Problem:
    """A small one: 6 non-zeros of 24, 12 allowed."""
    random = generator(seed)
    sensing = torch.randn(48, 24, generator=random, dtype=torch.float64) / 48**0.5
    goal = top_k(torch.randn(24, generator=random, dtype=torch.float64), 6)
    return Problem.make(sensing, goal, torch.rand(24, generator=random, dtype=torch.float64), 12)


def run(**settings: object) -> Outcome:
    return SparseRecovery(**{**SMALL, **settings}).run(Material(), Silent())  # type: ignore[arg-type]


def test_gradient_and_loss_are_those_of_the_residual() -> None:
    one = problem(0)
    point = one.start.clone().requires_grad_()
    residual = one.sensing @ (point - one.goal)
    (residual.square().sum() / 2).backward()
    assert point.grad is not None
    torch.testing.assert_close(one.gradient(one.start), point.grad)
    assert one.loss(one.start) == pytest.approx(float(residual.detach().square().mean()))


def test_the_published_gradient_is_that_of_the_mean_squared_error() -> None:
    """PyTorch's own MSE loss, and Newton's step with XᵀX solved anew."""
    one = problem(1)
    point = one.start.clone().requires_grad_()
    torch.nn.functional.mse_loss(one.sensing @ point, one.target).backward()
    assert point.grad is not None
    hessian = one.sensing.T @ one.sensing
    newton = one.start - torch.linalg.solve(hessian, point.grad)
    torch.testing.assert_close(KINDS["topk"](2 / 48).step(one, one.start, generator(0)), top_k(newton, 12))
    slow = one.start - point.grad / torch.linalg.matrix_norm(hessian, 2)
    torch.testing.assert_close(Iht(2 / 48).step(one, one.start, generator(0)), top_k(slow, 12))


def test_option_2_leaves_no_gradient_toward_the_newton_point_on_its_support() -> None:
    """It is the point nearest to the Newton point in the norm of H, among those with its own support."""
    one = problem(2)
    newton = one.start - 2 / 48 * torch.linalg.solve(one.hessian, one.gradient(one.start))
    found = KINDS["obs"](2 / 48).step(one, one.start, generator(0))
    pull = one.hessian @ (newton - found)
    assert int((found != 0).sum()) == 12
    assert float(pull[found != 0].abs().max()) < 1e-10 < float(pull.abs().max())


def test_a_whole_batch_makes_the_stochastic_gradient_exact() -> None:
    one = problem(3)
    gradient = one.gradient(one.start)
    expected = top_k(one.start - gradient / (10 + gradient.square().sum() / gradient.norm()), 12)
    torch.testing.assert_close(Stochastic(10.0, 48).step(one, one.start, generator(0)), expected)
    assert not torch.equal(Stochastic(10.0, 6).step(one, one.start, generator(0)), expected)


def test_a_run_stays_where_only_rounding_is_left() -> None:
    one = problem(4)
    newton = follow(one, Run("", KINDS["topk"](1), 50), {1, 50}, {1, 50}, generator(0))
    slow = follow(one, Run("", Iht(2 / 48), 50), {0, 50}, {50}, generator(0))
    assert newton.distances[1] < 1e-12 * float(one.goal.norm()) and newton.found == 1
    assert torch.equal(newton.points[1], newton.points[50]) and len(newton.distances) == 51
    assert len(slow.distances) == 51 and list(slow.losses) == [0, 50]
    assert slow.losses[50] == one.loss(slow.points[50]) < slow.losses[0]
    assert newton.steps_to(0.5) == 1 and slow.steps_to(1e-9) is None


def test_the_set_up_is_the_papers() -> None:
    gaussian = PRIORS["gaussian"]
    one = draw_problem(gaussian.goals(Material()), gaussian, generator(0))
    assert (one.sensing.shape, int((one.goal != 0).sum()), one.survivors) == ((256, 128), 16, 64)
    assert float(one.sensing.var()) == pytest.approx(1 / 256, rel=0.05)
    assert 0.08 < float(one.start.abs().max()) <= 128**-0.5


def test_values() -> None:
    """Marks as the authors count: the loss before step t, the distance after it."""
    outcome = run()
    values = outcome.values
    assert max(values["newton.topk.worst.1"], values["newton.obs.worst.1"]) < 1e-12
    assert values["topk.loss.0"] == values["kiht.loss.0"] == values["obs.loss.0"]
    assert values["topk.distance.29"] < values["topk.distance.9"] < values["topk.distance.0"]
    assert values["newton.topk.distance.9"] < 1e-12 and "newton.topk.distance.29" not in values
    assert values["topk.share.0"] == 1 > values["topk.share.29"] > 0
    assert values["gain.29"] > 1
    assert values["newton.topk.steps.half"] == values["newton.topk.steps.hundredth"] == 1
    assert [figure.name for figure in outcome.figures] == ["curves", "consistent", "stochastic"]


def test_a_value_is_the_mean_over_seeds() -> None:
    """Seed by seed with the loop written out."""
    found = []
    for seed in range(2):
        random = generator(seed)
        one = draw_problem(PRIORS["gaussian"].goals(Material()), PRIORS["gaussian"], random)
        point = one.start
        for _ in range(10):
            residual = one.sensing @ point - one.target
            point = top_k(point - 2 / 256 * torch.linalg.lstsq(one.sensing, residual).solution, 64)
        found.append(float((point - one.goal).norm()))
    assert run(steps=10, dampings=[]).values["topk.distance.9"] == pytest.approx(sum(found) / 2, rel=1e-9)


def test_the_same_seeds_give_the_same_values() -> None:
    short = {"steps": 5, "marks": [0, 4], "consistent_steps": 5}
    assert run(**short).values == run(**short).values != run(seeds=1, **short).values


def test_the_authors_numbers_stand_beside_ours() -> None:
    rows = {row[0]: row[2] for row in run(published={"topk.distance.9": [2.5, 0.25]}).tables[0].rows}
    assert rows["topk.distance.9"] == "2.5 ± 0.25" and rows["topk.distance.0"] == ""


@pytest.mark.parametrize("settings", [{"prior": "gausian"}, {"algorithms": ["topq"]}, {"consistent": ["newton"]}])
def test_unknown_names_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match="unknown"):
        run(**settings)


def test_mnist_needs_its_images() -> None:
    with pytest.raises(InputError, match="mnist/t10k-images"):
        run(prior="mnist")


class Two(Material):
    """Two images of one pixel and of five."""

    def mnist_test(self) -> tuple[Tensor, Tensor]:
        images = torch.zeros(2, 28, 28)
        images[0, 0, 0], images[1, 3, 3:8] = 255, 200
        return images, torch.tensor([0, 1])


def test_images_are_the_vectors_of_the_mnist_prior() -> None:
    settings = {
        "prior": "mnist",
        "seeds": 1,
        "steps": 3,
        "algorithms": ["topk"],
        "consistent": ["topk"],
        "marks": [0, 2],
    }
    study = SparseRecovery(**settings, images=[3, 4])  # type: ignore[arg-type]
    slow, fast = study.run(Two(Path()), Silent()).figures[-1].panels
    assert list(slow.rows) == ["true", "Topk-I-OBS, 3"] and list(fast.rows) == ["true", "Topk-I-OBS, 1"]  # type: ignore[attr-defined]
    torch.testing.assert_close(*(fast.rows[name][0] for name in fast.rows))  # type: ignore[attr-defined]
    assert [MnistPrior().survivors(image.flatten()) for image in Two().mnist_test()[0]] == [2, 10]


def test_every_algorithm_keeps_k() -> None:
    one = problem(5)
    for kind in KINDS.values():
        assert int((kind(2 / 48).step(one, one.start, generator(0)) != 0).sum()) == one.survivors
