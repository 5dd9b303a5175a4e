"""Evidence for whole networks against second derivatives and loops over samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from obsprune.engine.curvature import CURVATURES, Trainee
from obsprune.errors import InputError
from obsprune.models.samples import Batch

CLASSES = 3


def dense_net(unit: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), unit(), nn.Linear(6, 4), unit(), nn.Linear(4, CLASSES))


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def batch_for(*shape: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(*shape, generator=generator),
        "labels": torch.randint(CLASSES, shape[:1], generator=generator),
    }


def trainee_of(network: nn.Module) -> Trainee:
    return Trainee.of(network, lambda batch: network(batch["x"]))


def hessian_diagonals(network: nn.Module, batch: Batch) -> list[Tensor]:
    """Of the mean loss, one weight after the other."""

    def loss(*weights: Tensor) -> Tensor:
        named = dict(zip(names, weights, strict=True))
        return functional.cross_entropy(torch.func.functional_call(network, named, batch["x"]), batch["labels"])

    names = [name for name, _ in network.named_parameters() if name.endswith("weight")]
    weights = tuple(network.get_parameter(name).detach() for name in names)
    rows = torch.autograd.functional.hessian(loss, weights)
    return [
        rows[i][i].reshape(w.numel(), w.numel()).diagonal().reshape(w.shape)  # type: ignore[index,union-attr]
        for i, w in enumerate(weights)
    ]


@pytest.mark.parametrize(("unit", "exact"), [(nn.ReLU, True), (nn.Tanh, False)])
def test_gauss_newton_is_the_exact_diagonal_of_a_relu_net(unit: type[nn.Module], exact: bool) -> None:
    network, batch = dense_net(unit), batch_for(7, 5)
    trainee = trainee_of(network)
    found = CURVATURES["gauss-newton"].evidence(trainee, [batch])
    for matrix, wanted in zip(trainee.matrices, hessian_diagonals(network, batch), strict=True):
        last = matrix.name == "4"  # nothing bends behind the last layer
        assert torch.allclose(found[matrix.name].h_RC, wanted, atol=1e-6) == (exact or last)


@pytest.mark.parametrize("make", [lambda: dense_net(nn.Tanh), conv_net], ids=["dense", "convolutions"])
def test_sample_fisher_and_gradient_against_a_loop(make: type[nn.Module]) -> None:
    network = make()
    shape = (5,) if isinstance(network[0], nn.Linear) else (2, 6, 6)  # type: ignore[index]
    batches = [batch_for(4, *shape), batch_for(4, *shape, seed=1)]
    trainee = trainee_of(network)
    found = CURVATURES["sample"].evidence(trainee, batches)
    singles = [{key: value[i : i + 1] for key, value in batch.items()} for batch in batches for i in range(4)]
    for matrix in trainee.matrices:
        gradients = []
        for single in singles:
            network.zero_grad()
            trainee.mean_loss(single).backward()  # type: ignore[no-untyped-call]
            gradients.append(matrix.gradient().clone())
        own = torch.stack(gradients)
        assert torch.allclose(found[matrix.name].g_RC, own.mean(0), atol=1e-6)
        assert torch.allclose(found[matrix.name].h_RC, own.square().mean(0), atol=1e-6)


def test_batch_fisher_squares_the_gradients_of_batches() -> None:
    network, batches = dense_net(nn.ReLU), [batch_for(4, 5), batch_for(4, 5, seed=1)]
    trainee = trainee_of(network)
    found = CURVATURES["batch"].evidence(trainee, batches)
    name = trainee.matrices[0].name
    weight = network.get_parameter("0.weight")
    own = [torch.autograd.grad(trainee.mean_loss(batch), weight)[0] for batch in batches]
    assert torch.allclose(found[name].h_RC, (own[0].square() + own[1].square()) / 2)
    assert torch.allclose(found[name].g_RC, (own[0] + own[1]) / 2)
    assert not CURVATURES["none"].evidence(trainee, batches)[name].h_RC.any()


def test_kfac_keeps_mean_squares_of_both_sides() -> None:
    network, batch = dense_net(nn.ReLU), batch_for(64, 5)
    trainee = trainee_of(network)
    exact = CURVATURES["sample"].evidence(trainee, [batch])["0"].h_RC
    kfac = CURVATURES["kfac"].evidence(trainee, [batch])["0"].h_RC
    assert torch.linalg.matrix_rank(kfac) == 1
    assert torch.linalg.matrix_rank(exact) > 1
    assert float(torch.corrcoef(torch.stack([exact.flatten(), kfac.flatten()]))[0, 1]) > 0.8


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="has no Linear or Conv2d layer"):
        trainee_of(nn.Sequential(nn.ReLU()))
    shared = nn.Linear(5, 5)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(InputError, match="runs twice"):
        CURVATURES["sample"].evidence(trainee_of(network), [batch_for(4, 5)])
