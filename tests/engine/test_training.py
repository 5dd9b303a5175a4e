"""Pruning with retraining: exact counts, zeros that stay under every optimizer, nothing left to chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn

from obsprune.core.saliency import FirstOrder, Magnitude, OptimalBrainDamage, Taylor
from obsprune.engine.curvature import CURVATURES, Trainee
from obsprune.engine.training import Criterion, Layerwise, Masks, Ranked, Retraining, evenly, prune_in_steps
from obsprune.errors import ObspruneError
from obsprune.models.samples import Batch
from obsprune.progress import Silent
from obsprune.solvers import build

CRITERIA: dict[str, Criterion] = {
    "magnitude": Ranked(Magnitude(), CURVATURES["none"]),
    "first-order": Ranked(FirstOrder(), CURVATURES["none"]),
    "taylor": Ranked(Taylor(), CURVATURES["batch"]),
    "obd": Ranked(OptimalBrainDamage(), CURVATURES["gauss-newton"]),
    "sparsegpt": Layerwise(build("sparsegpt", {})),
    "admm": Layerwise(build("admm", {})),
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5),
}


def network_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )


def data(count: int = 48) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, 6, 6, generator=generator)
    return {"x": x, "labels": (x.mean((1, 2, 3)) * 30).long().clamp(-1, 1) + 1}


def epoch(generator: torch.Generator, size: int = 16) -> Iterator[Batch]:
    every = data()
    for indices in torch.randperm(48, generator=generator).split(size):
        yield {key: value[indices] for key, value in every.items()}


def run(
    criterion: Criterion, optimizer: str = "adam", epochs: int = 2, network: nn.Module | None = None, steps: int = 3
) -> tuple[Trainee, Masks, list[tuple[float, int]]]:
    network = network or network_of()
    trainee = Trainee.of(network, lambda batch: network(batch["x"]))
    retraining = Retraining(partial(epoch, torch.Generator().manual_seed(0)), OPTIMIZERS[optimizer], epochs)
    seen: list[tuple[float, int]] = []

    def after(sparsity: float, masks: Masks) -> str:
        seen.append((sparsity, zeros(trainee)))
        return ""

    masks = prune_in_steps(trainee, criterion, evenly(0.85, steps), [data()], retraining, Silent(), after)
    return trainee, masks, seen


def zeros(trainee: Trainee) -> int:
    return sum(int((matrix.read() == 0).sum()) for matrix in trainee.matrices)


@pytest.mark.parametrize("name", CRITERIA)
def test_exact_counts_after_every_step_of_training(name: str) -> None:
    trainee, masks, seen = run(CRITERIA[name])
    assert trainee.size == 2 * 2 * 9 + 64 * 7 + 7 * 3
    assert [count for _, count in seen] == [round(sparsity * trainee.size) for sparsity in evenly(0.85, 3)]
    for matrix in trainee.matrices:
        assert torch.equal(matrix.read() != 0, masks[matrix.name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_zero_whatever_the_optimizer_does(optimizer: str) -> None:
    trainee, masks, _ = run(CRITERIA["taylor"], optimizer, epochs=5)
    assert zeros(trainee) == sum(int((~keep).sum()) for keep in masks.values()) == round(0.85 * trainee.size)
    dense = {name: parameter.clone() for name, parameter in network_of().named_parameters()}
    survivors = trainee.network.get_parameter("4.weight")
    assert not torch.equal(survivors[masks["4"]], dense["4.weight"][masks["4"]])  # they have learned


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "admm"])  # which may change its mind
def test_what_is_pruned_stays_pruned(name: str) -> None:
    network = network_of()
    trainee = Trainee.of(network, lambda batch: network(batch["x"]))
    before: Masks = {}
    for sparsity in (0.3, 0.6, 0.8):
        masks = CRITERIA[name].prune(trainee, before, sparsity, [data()])
        for matrix, keep in before.items():
            assert not bool((masks[matrix] & ~keep).any())
        before = masks


def test_ranking_is_over_all_matrices_together() -> None:
    network = network_of()
    with torch.no_grad():
        network.get_parameter("6.weight").mul_(100)
    trainee = Trainee.of(network, lambda batch: network(batch["x"]))
    masks = CRITERIA["magnitude"].prune(trainee, {}, 0.5, [data()])
    every = torch.cat([matrix.read().abs().flatten() for matrix in Trainee.of(network_of(), lambda b: b["x"]).matrices])
    assert bool(masks["6"].all())
    assert not bool(masks["4"].all())
    assert len(every) == trainee.size


def test_layerwise_takes_the_same_share_of_every_matrix() -> None:
    _, masks, _ = run(CRITERIA["sparsegpt"], epochs=0)
    for keep in masks.values():
        assert abs(float((~keep).double().mean()) - 0.85) < 1 / keep.numel() + 1e-9


def test_a_layer_solver_repairs_what_magnitude_leaves() -> None:
    losses = {}
    for name in ("magnitude", "admm"):
        network = network_of()
        trainee = Trainee.of(network, lambda batch, network=network: network(batch["x"]))
        Retraining(partial(epoch, torch.Generator().manual_seed(0)), OPTIMIZERS["adam"], 40)(trainee, {})
        dense = trainee.logits(data()).detach()
        Layerwise(build(name, {})).prune(trainee, {}, 0.5, [data()])
        losses[name] = float((trainee.logits(data()) - dense).detach().square().mean())
    assert losses["admm"] < losses["magnitude"] / 2


def test_same_seed_same_bytes() -> None:
    first, second = (run(CRITERIA["taylor"])[0].network.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_retraining_helps_and_leaves_evaluation_mode() -> None:
    trainee, _, _ = run(CRITERIA["magnitude"], epochs=0)
    retrained, _, _ = run(CRITERIA["magnitude"], epochs=20)
    assert not retrained.network.training
    trainee.network.eval()
    assert retrained.mean_loss(data()).item() < trainee.mean_loss(data()).item()


def test_the_rate_falls_as_it_is_told() -> None:
    rates: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step()

    network = network_of()
    trainee = Trainee.of(network, lambda batch: network(batch["x"]))
    batches = partial(epoch, torch.Generator().manual_seed(0), 48)
    Retraining(batches, lambda parameters: Spy(parameters, lr=1.0), 4, rate=lambda done: 1 - done)(trainee, {})
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_only_the_parameters_named_are_trained() -> None:
    network, dense = network_of(), network_of()
    trainee = Trainee.of(network, lambda batch: network(batch["x"]))
    chosen = [network.get_parameter("4.weight")]
    Retraining(partial(epoch, torch.Generator().manual_seed(0)), OPTIMIZERS["adam"], 1, parameters=chosen)(trainee, {})
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, dense.get_parameter(n))}
    assert changed == {"4.weight"}


def test_a_rate_that_explodes_is_an_error() -> None:
    network = network_of()
    trainee = Trainee.of(network, lambda batch: network(batch["x"]))
    wild = Retraining(partial(epoch, torch.Generator().manual_seed(0)), partial(torch.optim.SGD, lr=1e30), 3)
    with pytest.raises(ObspruneError, match="loss is not finite; lower the learning rate"):
        wild(trainee, {})
    last = Retraining(partial(epoch, torch.Generator(), 48), lambda p: torch.optim.SGD(p, lr=float("inf")), 1)
    with pytest.raises(ObspruneError, match="weights are not finite; lower the learning rate"):
        last(trainee_of(network_of()), {})


def trainee_of(network: nn.Module) -> Trainee:
    return Trainee.of(network, lambda batch: network(batch["x"]))
