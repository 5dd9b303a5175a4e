from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import drop_lowest
from torch import Tensor

from obsprune.core.patterns import Given, Lowest, LowestPerRow, NofM, Pattern, PerRow, Unstructured, prune_lowest
from obsprune.errors import InputError

# Derandomised: the same examples on every machine.
thorough = settings(derandomize=True, deadline=None, database=None, max_examples=200)

shares = st.floats(0, 1, allow_nan=False)
sizes = st.integers(1, 40)


def randn(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


@thorough
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_prune_lowest_is_the_first_of_a_stable_sort(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    vector = torch.tensor(scores, dtype=torch.float32)
    assert torch.equal(prune_lowest(vector[None], count)[0], drop_lowest(vector, count))


def test_prune_lowest_orders_minus_infinity_before_everything() -> None:
    scores = torch.tensor([[0.0, -torch.inf, -1.0, -torch.inf]])
    assert prune_lowest(scores, 1).tolist() == [[True, False, True, True]]
    assert prune_lowest(scores, 3).tolist() == [[True, False, False, False]]


@thorough
@given(shares, sizes, sizes)
def test_unstructured_prunes_the_rounded_share_of_the_matrix(share: float, rows: int, columns: int) -> None:
    pattern = Unstructured(share)
    keep = pattern.keep(randn(rows, columns))
    assert int((~keep).sum()) == pattern.pruned(rows, columns) == round(share * rows * columns)


@thorough
@given(shares, sizes, sizes)
def test_per_row_prunes_the_rounded_share_of_each_row(share: float, rows: int, columns: int) -> None:
    pattern = PerRow(share)
    keep = pattern.keep(randn(rows, columns))
    assert (~keep).sum(1).tolist() == [round(share * columns)] * rows
    assert pattern.pruned(rows, columns) == int((~keep).sum())


@thorough
@given(sizes, st.integers(1, 8), st.integers(1, 8), st.data())
def test_n_of_m_keeps_n_of_every_m(rows: int, groups: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, m))
    pattern = NofM(n, m)
    keep = pattern.keep(randn(rows, groups * m))
    assert bool((keep.unflatten(1, (groups, m)).sum(-1) == n).all())
    assert pattern.pruned(rows, groups * m) == int((~keep).sum())
    assert pattern.group == m


@pytest.mark.parametrize("m", [2, 3, 4, 16, 17, 32])
def test_few_and_many_of_a_group_are_chosen_alike_ties_by_index(m: int) -> None:
    scores = randn(5, 3 * m).mul(2).round()  # many of them equal
    keep = NofM(m // 2, m).keep(scores).reshape(-1, m)
    for group, kept in zip(scores.reshape(-1, m).tolist(), keep.tolist(), strict=True):
        gone = sorted(range(m), key=lambda place: (group[place], place))[: m - m // 2]
        assert [place for place in range(m) if not kept[place]] == sorted(gone)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Unstructured(0.5), [[0, 0, 0, 1], [0, 1, 1, 1]]),
        (PerRow(0.5), [[0, 1, 0, 1], [0, 0, 1, 1]]),
        (NofM(2, 4), [[0, 1, 0, 1], [0, 0, 1, 1]]),
        (NofM(1, 2), [[0, 1, 0, 1], [0, 1, 0, 1]]),
        (Lowest(3), [[0, 0, 0, 1], [1, 1, 1, 1]]),
        (LowestPerRow(1), [[0, 1, 1, 1], [0, 1, 1, 1]]),
    ],
    ids=str,
)
def test_ties_prune_the_lowest_index(pattern: Pattern, expected: list[list[int]]) -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 3.0], [2.0, 2.0, 3.0, 3.0]])
    assert pattern.keep(scores).int().tolist() == expected


@thorough
@given(st.sampled_from([Unstructured, PerRow]), shares, sizes, sizes, st.integers(1, 16))
def test_budgets_of_tiles_add_up_to_the_whole(
    kind: type[Unstructured] | type[PerRow], share: float, rows: int, columns: int, width: int
) -> None:
    pattern, total = kind(share), 0
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        tile = pattern.tile(rows, start, stop)
        tile.check(rows, stop - start)  # never negative, never more than the tile holds
        assert int((~tile.keep(randn(rows, stop - start))).sum()) == tile.pruned(rows, stop - start)
        total += tile.pruned(rows, stop - start)
    assert total == pattern.pruned(rows, columns)


def test_tiles_of_a_per_row_pattern_share_out_every_row() -> None:
    tiles = [PerRow(0.5).tile(3, start, start + 3) for start in (0, 3, 6)]
    assert tiles == [LowestPerRow(2), LowestPerRow(1), LowestPerRow(1)]  # round(1.5), round(3), round(4.5), cumulated


def test_tiles_of_n_of_m_and_of_a_mask_are_their_columns() -> None:
    scores, mask = randn(4, 16), randn(4, 16) > 0
    for pattern in (NofM(2, 4), Given(mask)):
        parts = [pattern.tile(4, start, start + 8).keep(scores[:, start : start + 8]) for start in (0, 8)]
        assert torch.equal(torch.cat(parts, 1), pattern.keep(scores))


def test_a_given_mask_answers_itself_whatever_the_scores() -> None:
    mask = randn(5, 6) > 0
    pattern = Given(mask)
    assert torch.equal(pattern.keep(randn(5, 6)), mask)
    assert pattern.pruned(5, 6) == int((~mask).sum())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NofM(5, 4), "5:4 keeps 5 of every 4 weights"),
        (lambda: NofM(-1, 2), "-1:2"),
        (lambda: Unstructured(1.01), "between 0 and 1, and this is 1.01"),
        (lambda: Unstructured(float("nan")), "nan"),
        (lambda: PerRow(-0.1), "between 0 and 1, and this is -0.1"),
    ],
)
def test_there_is_no_impossible_pattern(make: Callable[[], Pattern], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (NofM(2, 4), "2:4 needs an input width that 4 divides"),
        (Lowest(19), "cannot prune 19 of 18 weights"),
        (Lowest(-1), "cannot prune -1"),
        (LowestPerRow(7), "cannot prune 7 of 6 weights in a row"),
        (Given(torch.ones(3, 5, dtype=torch.bool)), r"the mask is \(3, 5\) and the matrix \(3, 6\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_check_refuses_a_matrix_that_cannot_obey(pattern: Pattern, says: str) -> None:
    with pytest.raises(InputError, match=says):
        pattern.check(3, 6)


@pytest.mark.parametrize(
    "pattern",
    [
        NofM(2, 3),
        NofM(0, 2),
        NofM(6, 6),
        Unstructured(0.0),
        Unstructured(1.0),
        PerRow(0.0),
        PerRow(1.0),
        Lowest(18),
        LowestPerRow(6),
        Given(torch.ones(3, 6, dtype=torch.bool)),
    ],
    ids=lambda pattern: type(pattern).__name__,
)
def test_check_accepts_a_matrix_that_can(pattern: Pattern) -> None:
    pattern.check(3, 6)
    assert int((~pattern.keep(randn(3, 6))).sum()) == pattern.pruned(3, 6)


@pytest.mark.parametrize("pattern", [Lowest(3), LowestPerRow(3)], ids=str)
def test_a_tile_has_no_tiles(pattern: Pattern) -> None:
    with pytest.raises(TypeError):
        pattern.tile(4, 0, 2)


@pytest.mark.parametrize(
    ("pattern", "closed"),
    [
        (Unstructured(0.5), []),
        (Lowest(3), []),
        (PerRow(0.25), [[0, 0], [0, 1], [0, 3], [0, 4], [0, 5], [0, 6], [0, 7]]),
        (LowestPerRow(1), [[0, 0], [0, 1], [0, 3], [0, 4], [0, 5], [0, 6], [0, 7]]),
        (NofM(3, 4), [[0, 0], [0, 1], [0, 3], [1, 4], [1, 6], [1, 7]]),
        (Given(torch.tensor([[True] * 8, [False] * 8])), [[0, c] for c in (0, 1, 3, 4, 5, 6, 7)]),
    ],
)
def test_what_may_be_pruned_next(pattern: Pattern, closed: list[list[int]]) -> None:
    """After one removal from each of two rows: survivors that the pattern protects from now on."""
    keep_RC = torch.ones(2, 8, dtype=torch.bool)
    keep_RC[0, 2] = keep_RC[1, 5] = False
    if isinstance(pattern, PerRow):
        keep_RC[0, 6] = False
        closed = [place for place in closed if place != [0, 6]]
    if isinstance(pattern, LowestPerRow):
        closed = closed + [[1, c] for c in (0, 1, 2, 3, 4, 6, 7)]
    may_RC = pattern.may_prune(keep_RC)
    assert not bool((may_RC & ~keep_RC).any())
    assert (keep_RC & ~may_RC).nonzero().tolist() == closed


def test_rows_of_a_given_mask() -> None:
    mask_RC = torch.rand(6, 5) < 0.5
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(Given(mask_RC).may_prune(everything, slice(3, 5)), ~mask_RC[3:5])
