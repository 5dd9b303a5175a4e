"""gRDA against its definition, against SGD, and against itself saved and loaded; directional pruning by brute force."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from obsprune.core.grda import GRDA, directional_pruning, directional_scores, growth, threshold
from obsprune.errors import InputError

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def loss_of(network: nn.Module) -> Tensor:
    dtype = next(network.parameters()).dtype
    return functional.mse_loss(network(X.to(dtype)), Y.to(dtype))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(network).backward()
        optimizer.step()


def flat(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def test_every_iterate_is_the_definition_s() -> None:
    """w_{n+1} = S_{g(n,γ)}(w_0 − γ Σ ∇f(w_k)), the sum kept whole, in float64."""
    network = net(torch.float64)
    optimizer = GRDA(network.parameters(), lr=0.1, c=0.05, mu=0.6)
    start, gradients = flat(network), []
    for step in range(1, 40):
        optimizer.zero_grad()
        loss_of(network).backward()
        gradients.append(torch.cat([one.grad.flatten() for one in network.parameters()]))  # type: ignore[union-attr]
        optimizer.step()
        v = start - 0.1 * torch.stack(gradients).sum(0)
        g = 0.05 * 0.1**0.5 * (step * 0.1) ** 0.6
        torch.testing.assert_close(flat(network), functional.softshrink(v, g), rtol=1e-12, atol=1e-14)
    assert int((flat(network) == 0).sum()) > 3


def test_with_c_0_it_is_sgd_bit_for_bit() -> None:
    ours, theirs = net(), net()
    train(ours, GRDA(ours.parameters(), lr=0.1, c=0.0), 20)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), 20)
    assert torch.equal(flat(ours), flat(theirs))


def test_groups_have_their_own_settings() -> None:
    network = net()
    biases, matrices = ([one for one in network.parameters() if one.ndim == rank] for rank in (1, 2))
    optimizer = GRDA([{"params": matrices, "mu": 0.7}, {"params": biases, "c": 0.0}], lr=0.1, c=0.05)
    train(network, optimizer, 50)
    assert all(bool((one != 0).all()) for one in biases)
    assert all(bool((one == 0).any()) for one in matrices)
    assert optimizer.state[matrices[0]]["threshold"] == pytest.approx(threshold(50, 0.1, 0.05, 0.7), rel=1e-12)
    assert optimizer.state[biases[0]]["threshold"] == 0


def test_a_weight_may_come_back() -> None:
    w = nn.Parameter(torch.tensor([0.001]))
    optimizer = GRDA([w], lr=0.1, c=0.1, mu=0.6)
    seen = []
    for gradient in (0.0, -5.0):
        w.grad = torch.tensor([gradient])
        optimizer.step()
        seen.append(float(w.detach()))
    assert seen[0] == 0 and seen[1] > 0.4


def test_growth_adds_up_to_the_threshold_and_follows_the_rate() -> None:
    assert sum(growth(n, 0.1, 5e-4, 0.51) for n in range(1, 101)) == pytest.approx(threshold(100, 0.1, 5e-4, 0.51))
    w = nn.Parameter(torch.ones(1))
    optimizer = GRDA([w], lr=0.1, c=0.1, mu=0.6)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.1)
    for _ in range(6):
        w.grad = torch.zeros(1)
        optimizer.step()
        schedule.step()
    expected = sum(growth(n, 0.1 if n <= 3 else 0.01, 0.1, 0.6) for n in range(1, 7))
    assert optimizer.state[w]["threshold"] == pytest.approx(expected, rel=1e-12)
    assert float(w.detach()) == pytest.approx(1 - expected)


def test_a_parameter_without_gradient_stays_and_a_closure_is_called() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 1e-9))
    optimizer = GRDA([used, unused], lr=0.1, c=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 2  # type: ignore[arg-type, union-attr]
    assert float(unused.detach()[0]) == pytest.approx(1e-9) and unused not in optimizer.state
    assert float(used.detach()[0]) == pytest.approx(0.8 - growth(1, 0.1, 1.0, 0.6))


def test_nan_is_not_hidden_by_the_threshold() -> None:
    w = nn.Parameter(torch.zeros(1))
    w.grad = torch.tensor([float("nan")])
    optimizer = GRDA([w], c=1.0)
    optimizer.step()
    assert bool(w.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_and_loaded_it_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    network = net(dtype)
    optimizer = GRDA(network.parameters(), lr=0.1, c=0.02, mu=0.55)
    train(network, optimizer, 7)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(network)
    again = GRDA(twin.parameters(), lr=9.0, c=9.0, mu=9.0)
    again.load_state_dict(torch.load(file))
    train(network, optimizer, 7)
    train(twin, again, 7)
    assert torch.equal(flat(network), flat(twin))
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["accumulator"], again.state[other]["accumulator"])
        assert optimizer.state[one]["threshold"] == again.state[other]["threshold"]
    assert again.param_groups[0]["c"] == 0.02


def test_what_is_loaded_is_a_copy() -> None:
    network = net()
    optimizer = GRDA(network.parameters(), lr=0.1)
    train(network, optimizer, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    twin = net()
    again = GRDA(twin.parameters())
    again.load_state_dict(saved)
    train(twin, again, 2)
    assert all(torch.equal(saved["state"][i]["accumulator"], before["state"][i]["accumulator"]) for i in range(4))


def test_bfloat16_weights_accumulate_in_float32() -> None:
    w = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = GRDA([w], lr=1e-4, c=0.0)
    for _ in range(200):
        w.grad = torch.ones(1, dtype=torch.bfloat16)
        optimizer.step()
    assert float(w.detach()) == pytest.approx(0.98, abs=4e-3)  # 1 − 1e-4 is 1 in bfloat16: w itself would never move


def test_with_accelerate_the_same_bytes(tmp_path: object) -> None:
    from accelerate import Accelerator

    plain, prepared = net(), net()
    train(plain, GRDA(plain.parameters(), lr=0.1, c=0.02), 10)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(prepared, GRDA(prepared.parameters(), lr=0.1, c=0.02))
    for step in range(10):
        if step == 5:
            accelerator.save_state(str(tmp_path))
            train(model, optimizer, 3)
            accelerator.load_state(str(tmp_path))
        optimizer.zero_grad()
        accelerator.backward(loss_of(model))
        optimizer.step()
    assert torch.equal(flat(plain), flat(accelerator.unwrap_model(model)))


@pytest.mark.parametrize("setting", [{"lr": -0.1}, {"c": -1.0}, {"mu": 0.0}, {"c": float("nan")}])
def test_values_that_cannot_be(setting: dict[str, float]) -> None:
    with pytest.raises(InputError, match="above 0 are expected"):
        GRDA([nn.Parameter(torch.ones(1))], **setting)


@pytest.mark.parametrize("seed", range(5))
def test_directional_pruning_is_the_minimiser(seed: int) -> None:
    """Against a fine grid, weight by weight; scores of both signs."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(8, generator=random, dtype=torch.float64)
    s = torch.randn(8, generator=random, dtype=torch.float64)
    grid = torch.linspace(-6, 6, 120001, dtype=torch.float64)
    cost = (w[:, None] - grid).square() / 2 + 0.7 * s[:, None] * grid.abs()
    found = directional_pruning(w, s, 0.7)
    torch.testing.assert_close(found, grid[cost.argmin(1)], rtol=0, atol=1e-4)
    assert int((found == 0).sum()) == int((w.abs() <= 0.7 * s).sum())


def test_scores_are_positive_where_the_flat_direction_shrinks_a_weight() -> None:
    random = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(8, 5, generator=random, dtype=torch.float64))[0]
    w = torch.randn(8, generator=random, dtype=torch.float64)
    s = directional_scores(w, lambda x: x - basis @ (basis.T @ x))
    moved = w - 1e-6 * (w.sign() - basis @ (basis.T @ w.sign()))
    assert torch.equal(s > 0, moved.abs() < w.abs())
    torch.testing.assert_close(basis.T @ moved, basis.T @ w)  # nothing in the steep directions
    assert float(s.sum()) >= 0  # ‖Π₀ sign(w)‖²
