"""Directional pruning's studies: the quadratics against brute force and small steps, curves, and small runs."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from obsprune.core.grda import directional_pruning, directional_scores, threshold
from obsprune.engine.curvature import ASKED
from obsprune.errors import InputError
from obsprune.progress import Silent
from obsprune.studies.directional.bench import Bench, falling, mlp
from obsprune.studies.directional.bezier import Bezier, along, named, trained
from obsprune.studies.directional.networks import Directional
from obsprune.studies.directional.quadratics import Quadratics, apart, common_zeros, order
from obsprune.studies.directional.subjects import SUBJECTS, next_tokens
from obsprune.studies.directional.tuning import Tuning, sparse_descent
from obsprune.studies.directional.valley import Valley, descend, scores_in_time, smallest_zeroed, sparsest_bottom
from obsprune.studies.material import Labelled, Material
from obsprune.studies.taylor import Signals

VALLEY = Valley.draw(3, 2, 4)


def hessian(valley: Valley, seed: int) -> Tensor:
    return valley.V_SRD[seed].T @ torch.diag(valley.h_R) @ valley.V_SRD[seed]


# ------------------------------------------------------------------------------------------------ quadratics


@pytest.mark.parametrize("seed", range(3))
def test_a_valley_is_a_quadratic_loss_with_a_flat_subspace(seed: int) -> None:
    H, w = hessian(VALLEY, seed), VALLEY.start_SD
    away = w[seed] - VALLEY.bottom_SD[seed]
    torch.testing.assert_close(VALLEY.loss(w)[seed], away @ H @ away / 2)
    gradient = VALLEY.gradient(w, torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(gradient[seed], H @ away)
    values, vectors = torch.linalg.eigh(H)
    null = vectors[:, values.abs() < 1e-9]
    assert null.shape[1] == 2
    torch.testing.assert_close(VALLEY.flat(w)[seed], null @ null.T @ w[seed])


def test_noise_has_the_covariance_of_the_hessian_and_no_flat_share() -> None:
    noise = torch.eye(2, dtype=torch.float64)
    columns = torch.stack([VALLEY.gradient(VALLEY.bottom_SD, row.expand(3, 2)) for row in noise], -1)
    torch.testing.assert_close(columns[0] @ columns[0].T, hessian(VALLEY, 0))
    assert float(VALLEY.flat(columns[..., 0]).abs().max()) < 1e-12


def test_descent_is_sgd_at_c_0_and_the_same_noise_for_all() -> None:
    first, again, sparse = descend(VALLEY, [0.0, 0.0, 0.5], 0.01, 0.6, 300, 0.3)
    assert torch.equal(first, again) and not torch.equal(first, sparse)
    w, random = VALLEY.start_SD.clone(), torch.Generator().manual_seed(0)
    for _ in range(300):
        noise = 0.3 * torch.randn(3, 2, generator=random, dtype=torch.float64)
        w = w - 0.01 * VALLEY.gradient(w, noise)
    torch.testing.assert_close(first, w)


def sparsest_by_brute_force(valley: Valley, seed: int, strength: float) -> Tensor:
    """All patterns of signs: each is a linear system for w on its support and the multipliers; the best that fits."""
    V, start, bottom = valley.V_SRD[seed], valley.start_SD[seed], valley.bottom_SD[seed]
    best, found = float("inf"), start
    for pattern in product((-1.0, 0.0, 1.0), repeat=len(start)):
        sign = torch.tensor(pattern, dtype=torch.float64)
        on = sign != 0
        if int(on.sum()) < len(V):
            continue
        A = V[:, on]
        multipliers = torch.linalg.lstsq(A @ A.T, (V @ bottom - A @ (start - strength * sign)[on])[:, None])[0][:, 0]
        w = torch.zeros_like(start)
        w[on] = (start - strength * sign)[on] + A.T @ multipliers
        if not torch.allclose(V @ w, V @ bottom) or bool((w[on].sign() != sign[on]).any()):
            continue
        cost = float(strength * w.abs().sum() + (w - start).square().sum() / 2)
        if cost < best:
            best, found = cost, w
    return found


@pytest.mark.parametrize("strength", [0.05, 0.5, 3.0])
def test_the_sparsest_bottom_by_brute_force(strength: float) -> None:
    found = sparsest_bottom(VALLEY, strength)
    expected = torch.stack([sparsest_by_brute_force(VALLEY, seed, strength) for seed in range(3)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert torch.equal(found == 0, expected == 0)


def test_directional_pruning_is_the_first_order_of_the_sparsest_bottom() -> None:
    valley = Valley.draw(4, 10, 20)
    sgd = sparsest_bottom(valley, 0.0)
    errors = []
    for strength in (1e-4, 1e-5):  # small enough that no weight comes to zero
        near = directional_pruning(sgd, directional_scores(sgd, valley.flat), strength)
        errors.append(apart(sparsest_bottom(valley, strength), near, strength))
    assert max(errors) < 1e-6


def test_scores_in_time_are_where_small_steps_lead() -> None:
    """Without a sign that changes, (w_SGD − w) sign / λ is s̄, up to the step's size."""
    valley = Valley.draw(4, 10, 20)
    bottom = valley.bottom_SD.sign() * (valley.bottom_SD.abs() + 1)
    started = Valley(valley.V_SRD, valley.h_R, bottom + 0.1 * valley.start_SD, bottom)
    rate, mu, time = 0.002, 0.6, 3.0
    sgd, grda = descend(started, [0.0, 0.05], rate, mu, round(time / rate), 0.0)
    unit = threshold(round(time / rate), rate, 0.05, mu)
    found = (sgd - grda) * sgd.sign() / unit
    torch.testing.assert_close(found, scores_in_time(started, sgd, time, mu), rtol=0, atol=5e-3)
    settled = scores_in_time(started, sgd, 1e4, mu)
    torch.testing.assert_close(settled, directional_scores(sgd, started.flat), rtol=0, atol=5e-4)


def test_small_measures() -> None:
    a, b = torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[0.0, 0.0, 4.0]])
    assert common_zeros(a, b) == pytest.approx(1 / 3) and common_zeros(a + 1, b + 1) == 1
    assert apart(a, b, 2.0) == pytest.approx((25 / 3) ** 0.5 / 2)
    assert order([1.0, 0.01], [1.0, 0.1]) == pytest.approx(0.5)
    assert smallest_zeroed(torch.tensor([[3.0, -1.0, 2.0], [1.0, 5.0, 4.0]]), [1, 2]).tolist() == [[3, 0, 2], [0, 5, 0]]


def test_quadratics_run_twice_the_same_and_the_theorem_shows() -> None:
    settings: dict[str, Any] = {"seeds": 4, "rates": [0.04, 0.005], "noises": [0.0], "time": 5.0, "strengths": [0.3]}
    first, second = (Quadratics(**settings).run(Material(), Silent()) for _ in range(2))
    assert first.values == second.values
    assert first.values["0.005.noise.0.distance"] < first.values["0.04.noise.0.distance"]
    assert first.values["0.04.noise.0.distance"] < first.values["0.04.noise.0.soft"] / 2
    assert first.values["lambda.0.3.path"] < first.values["lambda.0.3.linear"] / 2
    with pytest.raises(InputError, match="fewer than weights"):
        Quadratics(rank=60).run(Material(), Silent())


# ------------------------------------------------------------------------------------------------ curves


def toy() -> Labelled:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=random)
    y = (x[:, 0] + x[:, 1] ** 2 > 0.5).long()
    return Labelled(x[:150], y[:150], x[150:], y[150:], "made")


def test_a_bezier_is_its_ends_and_a_line() -> None:
    torch.manual_seed(0)
    start, end = mlp(3, 4, 2), mlp(3, 4, 2)
    line = Bezier.straight(start, end)
    w, u = (nn.utils.parameters_to_vector(one.parameters()) for one in (start, end))
    torch.testing.assert_close(line.at(0.0), w)
    torch.testing.assert_close(line.at(1.0), u)
    torch.testing.assert_close(line.at(0.3), 0.7 * w + 0.3 * u)
    x = torch.randn(6, 3)
    torch.testing.assert_close(functional_call(end, named(start, w), x), start(x))
    outputs = along(line, start, [0.0, 1.0], lambda network: float(network(x).detach().sum()))
    assert outputs == pytest.approx([float(start(x).sum().detach()), float(end(x).sum().detach())])
    torch.testing.assert_close(nn.utils.parameters_to_vector(start.parameters()), w)  # not moved


def test_a_trained_curve_has_the_same_ends_and_less_loss_between() -> None:
    bench = Bench.of(toy(), 25, 0)
    nets = [bench.trained(mlp_of(seed), partial(torch.optim.SGD, lr=0.3), 60) for seed in (0, 1)]
    line = Bezier.straight(*nets)
    random = torch.Generator().manual_seed(0)
    curve = trained(line, nets[0], partial(bench.train.batches, 25, random), 60, 0.05, random)
    assert torch.equal(curve.at(0.0), line.at(0.0)) and torch.equal(curve.at(1.0), line.at(1.0))
    places = [0.25, 0.5, 0.75]
    straight, bent = (max(along(one, nets[0], places, bench.train_loss)) for one in (line, curve))
    assert bent < straight / 2


def mlp_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return mlp(5, 16, 2)


# ------------------------------------------------------------------------------------------------ networks


def test_what_a_bench_measures() -> None:
    bench = Bench.of(toy(), 32, 0)
    network = bench.start((5, 16, 2))
    assert torch.equal(next(iter(network.parameters())), next(iter(bench.start((5, 16, 2)).parameters())))
    masks = bench.magnitude(network, 0.25)
    found = bench.found(network)
    assert found.zeros == 0.25 and sum(found.layers) > 0
    signals = Signals(bench.train.x, bench.train.y)
    assert found.train == signals.accuracy(network)
    with torch.no_grad():
        assert found.loss == pytest.approx(float(functional.cross_entropy(network(signals.x), signals.y)))
    again = bench.trained(network, partial(torch.optim.SGD, lr=0.1), 2, masks)
    assert bench.found(again).zeros == 0.25 and bench.found(network) == found
    assert next(signals.batches(7, torch.Generator().manual_seed(0)))[ASKED].shape == (7,)


def test_the_rate_falls_as_in_the_authors_code() -> None:
    assert [falling(done) for done in (0.0, 0.5, 0.7, 0.9, 1.0)] == pytest.approx([1, 1, 0.505, 0.01, 0.01])


SMALL: dict[str, Any] = {"seeds": 1, "runs": [[0.004, 0.51], [0.05, 0.6]], "epochs": 2, "retrain": 1, "curve": 1}


def test_the_same_settings_give_the_same_values(assets: Path) -> None:
    first, second = (Directional(**SMALL, joined=1).run(Material(assets), Silent()) for _ in range(2))
    assert first.values == second.values and first.tables == second.tables
    assert 0 < first.values["c0.004.mu0.51.zeros"] < first.values["c0.05.mu0.6.zeros"] < 1
    assert [figure.name for figure in first.figures] == ["accuracy", "curve"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"data": "mnist2d"}, "did you mean mnist1d"), ({"joined": 2}, "settings.joined"), ({"runs": [[0.1]]}, "pairs")],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Directional(**{**SMALL, "joined": 0, **settings}).require(Material())


# ------------------------------------------------------------------------------------------------ pretrained models


def test_a_patient_is_judged_and_restored(assets: Path) -> None:
    with SUBJECTS["stories260k"].opened(Material(assets), 6, 4, 2, 0) as patient:
        dense = patient.judge()
        assert len(patient.train) == 3 and patient.zeros == 0 and 3 < dense < 7
        with patient.kept(), torch.no_grad():
            for matrix in patient.trainee.matrices:
                matrix.tensor.view(-1)[::2] = 0
            assert patient.zeros == pytest.approx(0.5, abs=1e-3) and patient.judge() > dense
            assert [float(mask.double().mean()) for mask in patient.masks().values()] == pytest.approx(
                [1 - share for share in patient.layers()]
            )
        assert patient.zeros == 0 and patient.judge() == dense
        once, again = (list(patient.epoch(torch.Generator().manual_seed(3))) for _ in range(2))
        assert len(once) == 3 and all(torch.equal(a[ASKED], b[ASKED]) for a, b in zip(once, again, strict=True))


def test_next_tokens_is_the_mean_of_every_token_s_loss() -> None:
    z, ids = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    each = [-z[row, place].log_softmax(0)[ids[row, place + 1]] for row in range(2) for place in range(3)]
    torch.testing.assert_close(next_tokens(z, ids), torch.stack(each).mean())


def test_norms_and_biases_stay_dense() -> None:
    network = mlp_of(0)
    groups = sparse_descent(list(network.parameters()), 0.1, 0.5, 0.6).param_groups
    assert [group["c"] for group in groups] == [0.5, 0.0]
    assert [one.ndim for group in groups for one in group["params"]] == [2, 2, 1, 1]


def test_tuning_tells_of_every_method(assets: Path) -> None:
    study = Tuning(runs=[[0.5, 0.6]], samples=8, judged=8)
    values = study.run(Material(assets), Silent()).values
    methods = ("grda", "grda.adam", "magnitude", "magnitude.adam", "sparsegpt", "sparsegpt.adam")
    assert {f"c0.5.mu0.6.{method}" for method in methods} < set(values)
    assert 0.2 < values["c0.5.mu0.6.zeros"] < 0.5 and values["c0.5.mu0.6.sparsegpt"] < values["c0.5.mu0.6.magnitude"]


def test_tuning_needs_its_model_and_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean deit-tiny"):
        Tuning(subject="deit").require(Material(tmp_path))
    with pytest.raises(InputError, match=r"has no stories260k/model\.safetensors; --data DIR"):
        Tuning().require(Material(tmp_path))
