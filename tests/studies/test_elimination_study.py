"""Methods against removal done by hand, the Taylor bound against what it bounds, and what is read off the runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from obsprune.core.elimination import of_outputs
from obsprune.engine.curvature import ASKED, Trainee
from obsprune.engine.training import measure
from obsprune.errors import InputError
from obsprune.models.samples import Batch
from obsprune.progress import Silent
from obsprune.studies.elimination.bound import Paths, TaylorError, rank_correlation
from obsprune.studies.elimination.cost import WORK, operations
from obsprune.studies.elimination.data import PROBLEMS, Digits, Sorption
from obsprune.studies.elimination.intervals import Interval, Moving, output, remainder_bound
from obsprune.studies.elimination.methods import METHODS, Removal, listen, weight_of
from obsprune.studies.elimination.models import (
    WAYS,
    Look,
    PretrainedElimination,
    as_heard,
    bias_of,
    biases,
    compared,
    kept,
    of_inputs,
)
from obsprune.studies.elimination.networks import Elimination, method_of
from obsprune.studies.elimination.results import Case, Judged
from obsprune.studies.material import Material

SAMPLES = 12


@pytest.fixture
def small() -> tuple[Trainee, list[Batch]]:
    """4-3-2 with tanh, 12 samples in two batches."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(SAMPLES, 4), torch.randint(2, (SAMPLES,))
    batches = [{"x": x[part], ASKED: y[part]} for part in (slice(0, 5), slice(5, None))]
    return Trainee.of(network, lambda batch: network(batch["x"])), batches


def looked(name: str, small: tuple[Trainee, list[Batch]]) -> Removal:
    return METHODS[name].look(*small, torch.Generator().manual_seed(0))


def outputs(trainee: Trainee, batches: list[Batch]) -> Tensor:
    with torch.no_grad():
        return torch.cat([trainee.logits(batch) for batch in batches])


# ------------------------------------------------------------------------------------------------ methods


def test_elimination_is_the_jacobian_written_out(small: tuple[Trainee, list[Batch]]) -> None:
    trainee, batches = small
    removal, first = looked("elimination", small), trainee.matrices[0]
    x = torch.cat([batch["x"] for batch in batches])
    head, tail = trainee.network[0], trainee.network[1:]  # type: ignore[index]
    J = torch.stack([torch.func.jacrev(tail)(z) for z in head(x).detach()])  # [N, outputs, rows]
    heard = J.detach().square().sum(1)
    for r in range(3):
        for c in range(4):
            mean = float((heard[:, r] * x[:, c]).sum() / heard[:, r].sum())
            assert float(removal.means[first.name][r, c]) == pytest.approx(mean, rel=1e-4)
            left = float((heard[:, r] * (weight_of(first)[r, c] * (x[:, c] - mean)).square()).sum())
            assert float(removal.scores[first.name][r, c]) == pytest.approx(left, rel=1e-4)


def test_the_last_layer_is_exact_for_both(small: tuple[Trainee, list[Batch]]) -> None:
    # the output is linear in it: the expansion has nothing to leave out
    last = small[0].matrices[-1].name
    expanded, run = looked("elimination", small).scores[last], looked("exact", small).scores[last]
    torch.testing.assert_close(expanded.float() / SAMPLES, run, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("place", [(0, 2), (2, 1)])
def test_exact_is_the_network_run_without_the_weight(
    small: tuple[Trainee, list[Batch]], place: tuple[int, int]
) -> None:
    trainee, batches = small
    removal, before = looked("exact", small), outputs(trainee, batches)
    matrix = trainee.matrices[0]
    change = float(weight_of(matrix)[place] * removal.means[matrix.name][place])
    with torch.no_grad():
        trainee.network[0].bias[place[0]] += change  # type: ignore[index]
    weight_of(matrix)[place] = 0
    found = float((outputs(trainee, batches) - before).square().sum(1).mean())
    assert float(removal.scores[matrix.name][place]) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_counts_are_exact_and_biases_take_what_they_are_told(
    small: tuple[Trainee, list[Batch]], name: str, sparsity: float
) -> None:
    trainee, _ = small
    removal, before = looked(name, small), copy.deepcopy(trainee.network)
    masks = removal.carry_out(trainee, sparsity)
    zeros = sum(int((weight_of(matrix) == 0).sum()) for matrix in trainee.matrices)
    assert zeros == round(sparsity * 18) == sum(int((~mask).sum()) for mask in masks.values())
    for matrix, old in zip(trainee.matrices, (before[0], before[2]), strict=True):  # type: ignore[index]
        gone = (~masks[matrix.name]).float() * old.weight.detach()
        expected = old.bias.detach() + torch.stack(
            [g @ m.float() for g, m in zip(gone, removal.means[matrix.name], strict=True)]
        )
        assert matrix.bias is not None
        torch.testing.assert_close(matrix.bias.detach(), expected)


@pytest.mark.parametrize("name", ["random", "magnitude", "gradient", "bias-stays"])
def test_rivals_leave_biases_alone(small: tuple[Trainee, list[Batch]], name: str) -> None:
    assert all(not bool(mean.any()) for mean in looked(name, small).means.values())


def test_what_was_pruned_before_goes_first(small: tuple[Trainee, list[Batch]]) -> None:
    trainee, _ = small
    gone = ~looked("magnitude", small).carry_out(trainee, 0.4)["0"]
    again = looked("random", small).carry_out(trainee, 0.6)
    assert not bool((again["0"] & gone).any())
    assert sum(int((weight_of(matrix) == 0).sum()) for matrix in trainee.matrices) == round(0.6 * 18)


def test_the_network_stays_nearer_than_with_biases_that_stay(small: tuple[Trainee, list[Batch]]) -> None:
    trainee, batches = small
    with torch.no_grad():
        trainee.network[0].bias += 0.5  # type: ignore[index]
    for batch in batches:
        batch["x"] += 1.0  # inputs with a mean
    before, changes = outputs(trainee, batches), {}
    for name in ("elimination", "bias-stays"):
        pruned = copy.deepcopy(trainee.network)
        other = Trainee.of(pruned, lambda batch, pruned=pruned: pruned(batch["x"]))  # type: ignore[misc]
        looked(name, small).carry_out(other, 0.3)
        changes[name] = float((outputs(other, batches) - before).square().mean())
    assert changes["elimination"] < 0.7 * changes["bias-stays"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean elimination"):
        method_of("eliminatoin-again")
    with pytest.raises(InputError, match=r"settings\.data"):
        Elimination(data="mnits").run(Material(), Silent())


# ------------------------------------------------------------------------------------------------ data and runs


def test_columns_of_soil_are_kept_apart() -> None:
    parts = Sorption(columns=5, cells=4, steps=3).parts(Material(), 0.5, seed=0)
    starts = [set(part.x[:, 2].tolist()) for part in (parts.train, parts.test)]
    assert [len(several) for several in starts] == [4, 1] and not starts[0] & starts[1]
    clean = Sorption(columns=5, cells=4, steps=3).parts(Material(), 0.0, seed=0)
    assert torch.equal(parts.train.x, clean.train.x) and torch.equal(parts.test.y, clean.test.y)
    assert float((parts.train.y - clean.train.y).std() / clean.train.y.std()) == pytest.approx(0.5, rel=0.3)
    assert len(set(parts.train.x[:8, 2].tolist())) > 1  # methods look at the first cases


def test_digits_are_split_by_seed(assets: Path) -> None:
    first, other = (Digits(0.1307, 0.3081).parts(Material(assets), 0.0, seed) for seed in range(2))
    assert (len(first.train.x), len(first.test.x)) == (8000, 2000)
    assert not torch.equal(first.test.x, other.test.x)
    assert abs(float(first.train.x.mean())) < 0.05 and abs(float(first.train.x.std()) - 1) < 0.05


@pytest.mark.parametrize("name", PROBLEMS)
def test_parameters_are_counted_rightly(name: str) -> None:
    problem = PROBLEMS[name]
    network = problem.network(3, 7, seed=0)
    assert sum(one.numel() for one in network.parameters()) == problem.parameters(3, 7)
    assert len([one for one in network if isinstance(one, nn.Linear)]) == 4  # three hidden layers, and the output


def test_a_run_repeats_itself() -> None:
    study = Elimination(
        seeds=1, data="diffusion", width=6, epochs=1, levels=[0.3, 0.8], tuned_levels=[0.8], scored=200, batch=2048,
        methods=["random", "small", "elimination", "elimination-again"],
    )  # fmt: skip
    first, second = (study.run(Material(), Silent()) for _ in range(2))
    assert dict(first.values) == dict(second.values) and len(first.tables) == 2
    assert first.values["depth2.noise0.elimination.loss.0.30"] != first.values["depth2.noise0.random.loss.0.30"]
    at_once, again = (first.values[f"depth2.noise0.{name}.loss.0.30"] for name in ("elimination", "elimination-again"))
    assert at_once == again  # up to the first level both look at the same network
    assert {figure.name for figure in first.figures} == {"loss", "loss-tuned"}


def test_what_is_read_off() -> None:
    case = Case(2, 0.5, 0, [0.5, 0.8, 0.9])
    case.dense = [Judged(0.1, 95.0)]
    case.runs = {
        "magnitude": [[Judged(0.2, 94.5), Judged(0.3, 90.0), Judged(0.1, 94.5)]],
        "elimination": [[Judged(0.1, 95.0), Judged(0.2, 94.0), Judged(0.5, 60.0)]],
        "exact": [[Judged(0.0, 95.0), Judged(0.0, 94.0), Judged(0.0, 60.0)]],
    }
    values = case.values()
    assert values["depth2.noise0.5.elimination.kept"] == 80 and values["depth2.noise0.5.magnitude.kept"] == 50
    assert values["depth2.noise0.5.elimination.first"] == values["depth2.noise0.5.elimination.over.magnitude"] == 2 / 3
    assert values["depth2.noise0.5.elimination.over.exact"] == 0
    assert replace(case, tuning=2).prefix == "depth2.noise0.5.tuned."


# ------------------------------------------------------------------------------------------------ pretrained models


@pytest.fixture
def look(small: tuple[Trainee, list[Batch]]) -> Look:
    trainee, batches = small
    return Look(trainee, measure(trainee, batches), listen(trainee, batches, of_outputs))


@pytest.mark.parametrize("name", WAYS)
def test_every_way_prunes_exactly_and_is_undone(look: Look, name: str) -> None:
    matrices = look.trainee.matrices
    before = [(matrix.read().clone(), bias_of(matrix).clone()) for matrix in matrices]
    with kept(matrices):
        WAYS[name].prune(look, 0.5)
        zeros = [int((weight_of(matrix) == 0).sum()) for matrix in matrices]
        assert sum(zeros) == 9 and (zeros == [6, 3] or name == "elimination-together")
        stays = all(torch.equal(bias_of(matrix), bias) for matrix, (_, bias) in zip(matrices, before, strict=True))
        assert stays == (name in ("magnitude", "bias-stays", "wanda", "sparsegpt", "admm"))
    for matrix, (weight, bias) in zip(matrices, before, strict=True):
        assert torch.equal(matrix.read(), weight) and torch.equal(bias_of(matrix), bias)


@pytest.mark.parametrize("name", ["wanda-centred", "sparsegpt-centred", "elimination-mean"])
def test_mean_biases_keep_the_mean_of_the_layer_s_output(
    look: Look, small: tuple[Trainee, list[Batch]], name: str
) -> None:
    first, x = look.trainee.network[0], torch.cat([batch["x"] for batch in small[1]])  # type: ignore[index]
    with torch.no_grad():
        before = first(x).mean(0)
        WAYS[name].prune(look, 0.5)
        torch.testing.assert_close(first(x).mean(0), before)


def test_heard_biases_are_the_best_to_first_order(look: Look) -> None:
    # of the last layer, which the output hears everywhere alike, they are those that keep its mean
    last = look.trainee.matrices[-1]
    torch.testing.assert_close(as_heard(look, last.name), of_inputs(look, last.name))
    first = look.trainee.matrices[0]
    assert not torch.allclose(as_heard(look, first.name), of_inputs(look, first.name), rtol=0.05)


def test_layers_without_a_bias_have_one_for_a_while() -> None:
    network = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.Flatten(), nn.Linear(6, 3, bias=False))
    trainee, x = Trainee.of(network, lambda batch: network(batch["x"])), torch.randn(5, 4, 1, 1)
    before = network(x)
    with biases(trainee.matrices):
        assert [len(bias_of(matrix)) for matrix in trainee.matrices] == [6, 6, 3]
        assert torch.equal(network(x), before)
        bias_of(trainee.matrices[1])[trainee.matrices[1].rows] += 1
        assert not torch.equal(network(x), before)
    assert torch.equal(network(x), before) and network[0].bias is None and network[2].bias is None


def test_a_model_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stories260k/config\.json"):
        PretrainedElimination(models=["stories260k"]).require(Material(tmp_path))
    with pytest.raises(InputError, match="did you mean wanda"):
        PretrainedElimination(ways=["wandda"]).run(Material(tmp_path), Silent())


def test_agreement_with_the_dense_model() -> None:
    t = torch.log_softmax(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), -1)
    assert compared(t, t) == Judged(0.0, 100.0)
    other = compared(t.flip(0), t)
    assert other.score == 0 and other.loss > 0.5


# ------------------------------------------------------------------------------------------------ the bound


def moved(seed: int, size: float) -> tuple[list[Moving], Tensor]:
    """A 3-5-4-2 network with a path of this size, and inputs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = [3, 5, 4, 2]
    layers = [
        Moving(draw(rows, columns), draw(rows), size * draw(rows, columns), size * draw(rows))
        for columns, rows in pairwise(widths)
    ]
    return layers, draw(9, 3)


def remainder(layers: list[Moving], x: Tensor) -> Tensor:
    start, end = (torch.tensor(xi, dtype=torch.float64) for xi in (0.0, 1.0))
    before, slope, *_ = torch.func.jvp(lambda xi: output(layers, x, xi), (start,), (end,))
    return (output(layers, x, end) - before - slope).abs()


@pytest.mark.parametrize("size", [1e-3, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_no_error_is_beyond_its_bound(seed: int, size: float) -> None:
    layers, x = moved(seed, size)
    seen = remainder(layers, x)
    bounds = [remainder_bound(layers, x, pieces) for pieces in (1, 2, 16, 256)]
    assert all(bool((seen <= bound + 1e-12).all()) for bound in bounds)
    assert all(bool((b <= a * (1 + 1e-9)).all()) for a, b in pairwise(bounds))


def test_the_bound_is_near_the_error_of_a_small_step() -> None:
    layers, x = moved(0, 1e-4)
    assert float((remainder_bound(layers, x, 8) / remainder(layers, x)).median()) < 1.05


def test_intervals_hold_what_they_should() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(2, 50, generator=generator).sort(0).values
    a, b = Interval(ends[0], ends[1]), Interval(ends[0].flip(0), ends[1].flip(0))
    for share in torch.rand(20, 2, 1, generator=generator):
        p, q = (one.lo + part * (one.hi - one.lo) for one, part in zip((a, b), share, strict=True))
        for found, number in ((a * b, p * q), (a - b, p - q), (a + b, p + q), (a.square(), p * p)):
            assert bool(((found.lo <= number + 1e-6) & (number <= found.hi + 1e-6)).all())
    assert float(a.square().lo.min()) >= 0
    assert float(Interval(torch.tensor(-1.0), torch.tensor(2.0)).square().hi) == 4
    assert float(Interval(torch.tensor(-3.0), torch.tensor(2.0)).magnitude) == 3


def test_paths_are_removals(small: tuple[Trainee, list[Batch]]) -> None:
    trainee, batches = small
    removal = looked("elimination", small)
    x = torch.cat([batch["x"] for batch in batches]).double()
    paths = Paths(trainee, removal, x, SAMPLES, [4])
    seen, before = paths.seen(paths.lowest(0.5)), outputs(trainee, batches)
    removal.carry_out(trainee, 0.5)
    change = (outputs(trainee, batches) - before).square().mean().sqrt()
    assert seen.change == pytest.approx(float(change), rel=1e-4)
    assert seen.kept and seen.error <= seen.bounds[0]
    one = paths.seen(paths.one(17))  # of the last layer, where the output is linear
    assert one.error < 1e-12 and one.predicted == pytest.approx(one.change)


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 5.0], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 5.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


def test_a_bound_study_keeps_its_bounds() -> None:
    study = TaylorError(width=5, epochs=1, samples=10, weights=5, levels=[0.2, 0.9], pieces=[1, 2], scored=100)
    outcome = study.run(Material(), Silent())
    assert outcome.values["kept"] == 1 and outcome.values["single.bound.2"] >= 1
    assert outcome.values["joint.0.9.bound"] >= 1


# ------------------------------------------------------------------------------------------------ cost


def test_operations_are_those_of_the_products(small: tuple[Trainee, list[Batch]]) -> None:
    trainee, batches = small
    forward = 2 * 7 * (4 * 3 + 3 * 2)  # of the second batch
    assert operations(WORK["back-propagation"], trainee, batches[1]) == 2 * forward + 2 * 7 * 3 * 2
    sketch = forward + 2 * 7 * 3 * 2 + 2 * forward  # forward, through the last layer, two sums a matrix
    assert operations(WORK["sketch"], trainee, batches[1]) == sketch
    assert operations(WORK["exact"], trainee, batches[1]) == sketch * 2 - forward
