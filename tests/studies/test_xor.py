from __future__ import annotations

import pytest
import torch

from obsprune.errors import InputError
from obsprune.progress import Silent
from obsprune.studies.material import Material
from obsprune.studies.nets import Nets, Shape, train
from obsprune.studies.xor import BIASES, CRITERIA, Xor, _task, can_go, minima

FEW = Xor(seeds=10, steps=60, retraining=25)


def test_truth_on_a_net_made_by_hand() -> None:
    """Units for OR and AND; their biases are large, so retraining has work to do."""
    w = torch.tensor([[9.0, 9, 9, 9, -4, -13, 9, -9, -4]], dtype=torch.float64)
    task = _task(Shape(2, 2), 1, 1e-4)
    nets = train(task, Nets.whole(w), 100)
    assert task.accuracy(nets.w).tolist() == [100.0]
    right = can_go(task, nets, 100)[0]
    assert not bool(right[[place for place in range(9) if place not in BIASES]].any())
    assert bool(right[list(BIASES)].any())


def test_exact_hessian_is_autograds() -> None:
    task = _task(Shape(2, 2), 1, 0.0)
    w = Shape(2, 2).start(0, 1.0)
    expected = torch.autograd.functional.hessian(lambda w: task.error(w[None])[0], w)
    torch.testing.assert_close(task.exact_hessian(w[None])[0], expected)


def test_obs_deletes_the_right_weight_and_the_others_do_not() -> None:
    outcome = FEW.run(Material(), Silent())
    values = outcome.values
    assert values["nets"] >= 5 and values["right.other"] == 0
    assert values["obs.right"] == values["obs.solves"] == values["obs_exact.right"] == 1
    assert values["obd.right"] < 1 and values["magnitude.solves"] < 1
    assert len(outcome.tables[0].rows) == len(CRITERIA)


def test_same_seeds_same_values() -> None:
    first, second = (Xor(seeds=4, steps=30, retraining=5).run(Material(), Silent()).values for _ in range(2))
    assert dict(first) == dict(second)


def test_minima_are_counted_apart() -> None:
    assert minima(torch.tensor([0.3, 0.1, 0.10001, 0.2, 0.30001])) == 3
    assert minima(torch.tensor([0.5])) == 1


def test_no_net_to_count_is_an_error() -> None:
    with pytest.raises(InputError, match="solves XOR"):
        Xor(seeds=2, steps=20, decay=1.0, retraining=1).run(Material(), Silent())
