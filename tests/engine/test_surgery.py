"""Surgery on whole networks: gradients of samples, one ranking over all matrices, exact counts, lower loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from obsprune.core.cbs import CombinatorialSurgeon
from obsprune.core.fisher import Fisher, Surgeon, WoodFisher
from obsprune.core.saliency import Magnitude
from obsprune.engine.curvature import CURVATURES, Trainee
from obsprune.engine.fisher import Surgery, sample_gradients
from obsprune.engine.training import Criterion, Masks, Ranked, Retraining, prune_in_steps
from obsprune.errors import InputError
from obsprune.models.samples import Batch
from obsprune.progress import Silent

SURGEONS: dict[str, Surgeon] = {
    "woodfisher": WoodFisher(),
    "woodfisher, separate": WoodFisher(update=Fisher.separate_update),
    "cbs": CombinatorialSurgeon(),
    "cbs-s": CombinatorialSurgeon(update=False),
}


def network_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 7), nn.Tanh(),
        nn.Linear(7, 3),
    ).eval()  # fmt: skip


def data(count: int = 64, seed: int = 1) -> Batch:
    x = torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "labels": (x.mean((1, 2, 3)) * 30).long().clamp(-1, 1) + 1}


def trainee_of(network: nn.Module) -> Trainee:
    return Trainee.of(network, lambda batch: network(batch["x"]))


@pytest.fixture(scope="module")
def learned() -> dict[str, Tensor]:
    """A network at a minimum of its loss."""
    network, batch = network_of(), data()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        functional.cross_entropy(network(batch["x"]), batch["labels"]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.state_dict()


def fresh(learned: dict[str, Tensor]) -> Trainee:
    network = network_of()
    network.load_state_dict(learned)
    return trainee_of(network)


def test_gradients_of_samples_are_those_of_a_loop(learned: dict[str, Tensor]) -> None:
    trainee, batch = fresh(learned), data(6)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(4), slice(4, 6))]
    found = sample_gradients(trainee, halves)
    for row, x, label in zip(found, batch["x"], batch["labels"], strict=True):
        trainee.network.zero_grad()
        functional.cross_entropy(trainee.network(x[None]), label[None]).backward()  # type: ignore[no-untyped-call]
        own = torch.cat([matrix.gradient().flatten() for matrix in trainee.matrices])
        torch.testing.assert_close(row, own)
    assert found.shape == (6, trainee.size) == (6, 2 * 2 * 9 + 64 * 7 + 7 * 3)


def test_memory_is_asked_for_first(learned: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsprune.engine.fisher.free_bytes", lambda device: 1000)
    with pytest.raises(InputError, match=r"of 64 images at 505 weights take .* lower --nsamples"):
        sample_gradients(fresh(learned), [data()])


@pytest.mark.parametrize("name", SURGEONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.8, 1.0])
def test_exact_counts_over_all_matrices(learned: dict[str, Tensor], name: str, sparsity: float) -> None:
    trainee = fresh(learned)
    masks = Surgery(SURGEONS[name]).prune(trainee, {}, sparsity, [data()])
    shares = [float((~keep).float().mean()) for keep in masks.values()]
    assert sum(int((~keep).sum()) for keep in masks.values()) == round(sparsity * trainee.size)
    assert sparsity in (0.0, 1.0) or max(shares) - min(shares) > 0.1  # ranked together, not a share of each
    for matrix in trainee.matrices:
        assert torch.equal(matrix.read() == 0, ~masks[matrix.name])


@pytest.mark.parametrize("name", SURGEONS)
def test_steps_only_remove_more(learned: dict[str, Tensor], name: str) -> None:
    trainee = fresh(learned)
    masks: Masks = {}
    for sparsity in (0.2, 0.5, 0.7):
        before, masks = masks, Surgery(SURGEONS[name]).prune(trainee, masks, sparsity, [data()])
        assert all(not (masks[key] & ~keep).any() for key, keep in before.items())
        assert sum(int((matrix.read() == 0).sum()) for matrix in trainee.matrices) == round(sparsity * trainee.size)


def test_the_survivors_make_up_for_what_goes(learned: dict[str, Tensor]) -> None:
    """Mean loss at 60 %, nothing retrained: by the selection alone below magnitude, with the update lower still."""

    @torch.no_grad()
    def loss(criterion: Criterion) -> float:
        trainee = fresh(learned)
        with torch.enable_grad():
            criterion.prune(trainee, {}, 0.6, [data()])
        return float(trainee.mean_loss(data()))

    found = {name: loss(Surgery(surgeon)) for name, surgeon in SURGEONS.items()}
    magnitude = loss(Ranked(Magnitude(), CURVATURES["none"]))
    assert found["cbs"] < found["cbs-s"] < magnitude
    assert found["woodfisher"] < magnitude


def test_they_can_be_retrained(learned: dict[str, Tensor]) -> None:
    trainee = fresh(learned)
    retraining = Retraining(lambda: [data()], lambda p: torch.optim.SGD(p, lr=0.1), 2)
    masks = prune_in_steps(trainee, Surgery(WoodFisher()), [0.3, 0.6], [data()], retraining, Silent())
    assert all(not matrix.read()[~masks[matrix.name]].any() for matrix in trainee.matrices)
