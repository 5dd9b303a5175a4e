"""How several processes share samples and matrices; one process is the trivial case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsprune.errors import InputError
from obsprune.ranks import ALONE, Alone, deal


def ranks(rank: int, size: int) -> Alone:
    """A process among several that never talks to the others."""
    one = Alone()
    vars(one).update(rank=rank, size=size)
    return one


@given(st.integers(1, 7), st.integers(0, 90), st.integers(1, 40))
def test_every_sample_is_somebodys_and_all_have_as_many_batches(size: int, more: int, batch: int) -> None:
    count = size + more
    mine = [list(ranks(rank, size).mine(count)) for rank in range(size)]
    assert sorted(place for own in mine for place in own) == list(range(count))
    part = ranks(0, size).part(count, batch)
    assert len({-(-len(own) // part) for own in mine}) == 1
    assert part * size >= batch or part == 1


@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 6))
def test_a_batch_of_all_is_a_batch_of_one(size: int, part: int, batches: int) -> None:
    """Where the processes divide the batches, each step sees the samples that one process would see."""
    count, batch = size * part * batches, size * part
    shares = [list(ranks(rank, size).mine(count)) for rank in range(size)]
    assert ranks(0, size).part(count, batch) == part
    for number in range(batches):
        together = sorted(place for own in shares for place in own[number * part : (number + 1) * part])
        assert together == list(range(number * batch, (number + 1) * batch))


def test_one_process_has_everything() -> None:
    assert list(ALONE.mine(5)) == [0, 1, 2, 3, 4]
    assert ALONE.part(5, 2) == 2
    assert ALONE.gather("x") == ["x"]
    assert ALONE.device("auto") == "auto"


def test_too_few_samples() -> None:
    with pytest.raises(InputError, match="2 samples cannot be shared by 3 processes"):
        ranks(0, 3).mine(2)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 8))
def test_no_deal_is_worse_than_the_bound(costs: list[int], size: int) -> None:
    """Nobody is dealt a piece while somebody else has less to do (Graham 1969)."""
    owners = deal(costs, size)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= max(costs) + sum(costs) / size
    assert deal([7, 7, 5, 5], 2) == [0, 1, 0, 1]
