"""What must hold for every solver under every pattern. A new solver or pattern enters by one line in a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from reference import direct_loss
from torch import Tensor

from obsprune.core.patterns import Given, NofM, Pattern, PerRow, Unstructured
from obsprune.core.statistics import Gram
from obsprune.errors import InputError, NotPositiveDefinite
from obsprune.solvers import SOLVERS, build
from obsprune.solvers.base import AnySolver, Solution

REFIT = 10


def solver_of(name: str) -> AnySolver:
    """'wanda' or 'wanda+refit'."""
    method, _, refit = name.partition("+")
    return build(method, {"refit": REFIT if refit else 0})


NAMES = [*SOLVERS, *(f"{name}+refit" for name in SOLVERS)]
ITERATIVE = {"admm"}
DIRECT = [name for name in SOLVERS if name not in ITERATIVE]
BLIND = {"magnitude", "magnitude+refit"}
"""Methods that choose the mask without H, and so cannot know which inputs are dead."""


def share_of_all(sparsity: float) -> Callable[[Tensor], bool]:
    return lambda keep: int((~keep).sum()) == round(sparsity * keep.numel())


def share_of_rows(sparsity: float) -> Callable[[Tensor], bool]:
    return lambda keep: bool(((~keep).sum(1) == round(sparsity * keep.shape[1])).all())


def kept_of_group(n: int, m: int) -> Callable[[Tensor], bool]:
    return lambda keep: bool((keep.unflatten(1, (-1, m)).sum(-1) == n).all())


@dataclass(frozen=True)
class Case:
    """A pattern on a shape of more than two tiles of 128 columns, and an independent check of the count."""

    pattern: Pattern
    rows: int
    columns: int
    counted: Callable[[Tensor], bool]


CASES = {
    "50%": Case(Unstructured(0.5), 7, 300, share_of_all(0.5)),
    "70%": Case(Unstructured(0.7), 13, 261, share_of_all(0.7)),
    "50%-row": Case(PerRow(0.5), 6, 301, share_of_rows(0.5)),
    "2:4": Case(NofM(2, 4), 7, 300, kept_of_group(2, 4)),
    "4:8": Case(NofM(4, 8), 5, 264, kept_of_group(4, 8)),
    "1:4": Case(NofM(1, 4), 8, 260, kept_of_group(1, 4)),
}

every_solver = pytest.mark.parametrize("name", NAMES)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@cache
def inputs(columns: int) -> Tensor:
    """x_TC: correlated columns of different sizes, half as many tokens again as columns."""
    random = torch.Generator().manual_seed(columns)
    mix_CC = torch.eye(columns) + 0.7 * torch.randn(columns, columns, generator=random) / columns**0.5
    sizes_C = torch.exp(0.5 * torch.randn(columns, generator=random))
    return torch.randn(columns * 3 // 2, columns, generator=random) @ mix_CC * sizes_C


@cache
def weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 * rows + columns))


def gram(x_TC: Tensor) -> Gram:
    result = Gram(x_TC.shape[1], "blocks.0.fc1")
    result.add(x_TC)
    return result


def solve(name: str, W_RC: Tensor, sums: Gram, pattern: Pattern) -> Solution:
    solver = solver_of(name)
    return solver.solve(W_RC, solver.prepare(sums), pattern)


@cache
def solved(name: str, label: str) -> Solution:
    """The answer to the plain question of a case; most laws compare another answer with it."""
    case = CASES[label]
    return solve(name, weight(case.rows, case.columns), gram(inputs(case.columns)), case.pattern)


def same(one: Solution, other: Solution) -> bool:
    return torch.equal(one.keep, other.keep) and torch.equal(one.weight, other.weight) and one.loss == other.loss


def distance(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@every_solver
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_shape_dtype_zeros_count_and_loss(name: str, case: Case, dtype: torch.dtype) -> None:
    # Rounded weights also bring ties, which must not cost a weight more or less.
    x_TC, W_RC = inputs(case.columns), weight(case.rows, case.columns).to(dtype)
    answer = solve(name, W_RC, gram(x_TC), case.pattern)
    assert answer.weight.shape == answer.keep.shape == W_RC.shape
    assert answer.weight.dtype == dtype
    assert answer.keep.dtype == torch.bool
    assert bool((answer.weight[~answer.keep] == 0).all())
    assert bool((answer.weight[answer.keep] != 0).all())  # the zeros are the pruned ones and no others
    assert case.counted(answer.keep)
    assert answer.loss == pytest.approx(direct_loss(W_RC, answer.weight, x_TC), rel=1e-4)


@every_solver
@pytest.mark.parametrize("label", CASES)
def test_its_own_mask_given_back_reproduces_the_answer(name: str, label: str) -> None:
    case, answer = CASES[label], solved(name, label)
    again = solve(name, weight(case.rows, case.columns), gram(inputs(case.columns)), Given(answer.keep))
    if name in DIRECT and (name != "sparsegpt" or case.pattern.group is None):
        assert same(again, answer)  # of a known mask SparseGPT takes the sums of a group in another order
    assert torch.equal(again.keep, answer.keep)
    assert distance(again.weight, answer.weight) < (1e-5 if name in DIRECT else 1e-4)


@every_solver
@pytest.mark.parametrize("label", CASES)
def test_a_doubled_weight_doubles_the_answer_bit_for_bit(name: str, label: str) -> None:
    case, answer = CASES[label], solved(name, label)
    doubled = solve(name, 2 * weight(case.rows, case.columns), gram(inputs(case.columns)), case.pattern)
    assert torch.equal(doubled.keep, answer.keep)
    assert torch.equal(doubled.weight, 2 * answer.weight)
    assert doubled.loss == 4 * answer.loss


@every_solver
@pytest.mark.parametrize("label", CASES)
def test_a_scaled_gram_keeps_the_answer_bit_for_bit(name: str, label: str) -> None:
    case, answer = CASES[label], solved(name, label)
    louder = Gram.of(16 * gram(inputs(case.columns)).H_CC, 1)
    scaled = solve(name, weight(case.rows, case.columns), louder, case.pattern)
    assert torch.equal(scaled.keep, answer.keep)
    assert torch.equal(scaled.weight, answer.weight)
    assert scaled.loss == 16 * answer.loss


@every_solver
@pytest.mark.parametrize("label", CASES)
def test_permuted_rows_permute_the_answer(name: str, label: str) -> None:
    case, answer = CASES[label], solved(name, label)
    order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(order, torch.arange(case.rows))
    permuted = solve(name, weight(case.rows, case.columns)[order], gram(inputs(case.columns)), case.pattern)
    assert torch.equal(permuted.keep, answer.keep[order])
    assert distance(permuted.weight, answer.weight[order]) < 1e-5


@every_solver
@pytest.mark.parametrize("label", CASES)
def test_float64_and_float32_agree_but_for_near_ties(name: str, label: str) -> None:
    case, answer = CASES[label], solved(name, label)
    # H itself is the float32 sum in both: the law is about the solver's arithmetic.
    exact = solve(name, weight(case.rows, case.columns), gram(inputs(case.columns)).double(), case.pattern)
    differ_R = (exact.keep != answer.keep).any(1)
    assert int((exact.keep != answer.keep).sum()) <= 2  # one near tie decided the other way
    assert distance(answer.weight[~differ_R], exact.weight[~differ_R]) < 1e-4
    assert answer.loss == pytest.approx(exact.loss, rel=1e-3)


@every_solver
@every_case
def test_what_came_in_is_never_changed(name: str, case: Case) -> None:
    W_RC, sums = weight(case.rows, case.columns).clone(), gram(inputs(case.columns))
    H_CC, solver = sums.H_CC.clone(), solver_of(name)
    state = solver.prepare(sums)
    first = solver.solve(W_RC, state, case.pattern)
    assert torch.equal(W_RC, weight(case.rows, case.columns))
    assert torch.equal(sums.H_CC, H_CC)
    assert same(solver.solve(W_RC, state, case.pattern), first)  # nor is the state, which q, k and v share


@every_solver
@pytest.mark.parametrize("pattern", [Unstructured(0.0), PerRow(0.0), NofM(4, 4)], ids=["all", "row", "4:4"])
def test_sparsity_0_is_the_identity(name: str, pattern: Pattern) -> None:
    W_RC = weight(7, 300)
    answer = solve(name, W_RC, gram(inputs(300)), pattern)
    assert torch.equal(answer.weight, W_RC)
    assert bool(answer.keep.all())
    assert answer.loss == 0


@every_solver
@pytest.mark.parametrize("pattern", [Unstructured(1.0), PerRow(1.0), NofM(0, 4)], ids=["all", "row", "0:4"])
def test_sparsity_1_leaves_nothing(name: str, pattern: Pattern) -> None:
    W_RC, x_TC = weight(7, 300), inputs(300)
    answer = solve(name, W_RC, gram(x_TC), pattern)
    assert not bool(answer.weight.any())
    assert answer.loss == pytest.approx(direct_loss(W_RC, torch.zeros_like(W_RC), x_TC), rel=1e-4)


def with_dead(x_TC: Tensor, dead: list[int]) -> Tensor:
    return x_TC.index_fill(1, torch.tensor(dead), 0)


@every_solver
@every_case
def test_dead_columns_go_first(name: str, case: Case) -> None:
    dead = [0, 5, 77, 128, 133, 255, case.columns - 1]  # at most one in any group of four
    W_RC, x_TC = weight(case.rows, case.columns), with_dead(inputs(case.columns), dead)
    answer = solve(name, W_RC, gram(x_TC), case.pattern)
    assert bool(answer.weight.isfinite().all())
    assert case.counted(answer.keep)
    assert answer.loss == pytest.approx(direct_loss(W_RC, answer.weight, x_TC), rel=1e-4)
    if name not in BLIND:
        assert not bool(answer.keep[:, dead].any())


@every_solver
@pytest.mark.parametrize("pattern", [Unstructured(0.2), PerRow(0.2), NofM(3, 4)], ids=["all", "row", "3:4"])
def test_a_budget_smaller_than_the_dead_columns_costs_nothing(name: str, pattern: Pattern) -> None:
    dead = [column for column in range(300) if column % 4 < 2]
    W_RC, x_TC = weight(7, 300), with_dead(inputs(300), dead)
    answer = solve(name, W_RC, gram(x_TC), pattern)
    kept_dead_RC = answer.keep[:, dead]
    # Dead weights beyond the budget keep their value, whatever the method: nothing can be gained by moving them.
    assert torch.equal(answer.weight[:, dead][kept_dead_RC], W_RC[:, dead][kept_dead_RC])
    if name not in BLIND:
        assert answer.loss == 0
        assert torch.equal(answer.weight[answer.keep], W_RC[answer.keep])


@every_solver
def test_a_gram_of_zeros_gives_no_nan(name: str) -> None:
    answer = solve(name, weight(7, 300), gram(torch.zeros(9, 300)), Unstructured(0.5))
    assert bool(answer.weight.isfinite().all())
    assert share_of_all(0.5)(answer.keep)
    assert answer.loss == 0


@pytest.mark.parametrize("refit", [0, REFIT])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_with_a_diagonal_gram_sparsegpt_is_wanda_and_with_the_identity_magnitude(n: int, m: int, refit: int) -> None:
    W_RC = weight(7, 264)
    solver = build("sparsegpt", {"damping": 0.0, "refit": refit})
    for name, diagonal_C in (("wanda", inputs(264).square().sum(0)), ("magnitude", torch.ones(264))):
        sums = Gram.of(diagonal_C.diag(), 1)
        ours, plain = solver.solve(W_RC, solver.prepare(sums), NofM(n, m)), solve(name, W_RC, sums, NofM(n, m))
        assert torch.equal(ours.keep, plain.keep)
        assert torch.equal(ours.weight, plain.weight)  # nothing is correlated, so nothing can compensate


@every_case
def test_with_the_identity_wanda_is_magnitude(case: Case) -> None:
    W_RC, sums = weight(case.rows, case.columns), Gram.of(torch.eye(case.columns), 1)
    assert same(solve("wanda", W_RC, sums, case.pattern), solve("magnitude", W_RC, sums, case.pattern))


NEEDS_H = ["sparsegpt", "sparsegpt+refit"]


def with_damping(name: str, damping: float) -> AnySolver:
    return build("sparsegpt", {"damping": damping, "refit": REFIT if name.endswith("+refit") else 0})


@pytest.mark.parametrize("name", NEEDS_H)
@pytest.mark.parametrize(
    ("H_CC", "asked", "used"),
    [
        (torch.full((8, 8), 4.0), 0.0, 1e-4),  # rank one: no pivot after the first
        (torch.tensor([[1.0, 1.05], [1.05, 1.0]]), 0.01, 0.1),  # eigenvalue −0.05: 0.01 does not lift it, 0.1 does
    ],
    ids=["rank-deficient", "rescue"],
)
def test_a_failed_factorisation_climbs_the_ladder_and_says_so(
    name: str, H_CC: Tensor, asked: float, used: float
) -> None:
    W_RC, solver = weight(6, len(H_CC)), with_damping(name, asked)
    state = solver.prepare(Gram.of(H_CC, 1))
    answer = solver.solve(W_RC, state, Unstructured(0.5))
    outright = with_damping(name, used)
    expected = outright.solve(W_RC, outright.prepare(Gram.of(H_CC, 1)), Unstructured(0.5))
    assert answer.damping == expected.damping
    assert answer.damping == (max(used, solver.floor) if name.endswith("+refit") else used)  # type: ignore[attr-defined]
    assert same(answer, expected)


@pytest.mark.parametrize("name", NEEDS_H)
def test_a_matrix_no_damping_mends_is_refused_by_name(name: str) -> None:
    indefinite = Gram.of(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 17, "layers.3.mlp.down_proj")
    with pytest.raises(NotPositiveDefinite, match=r"layers\.3\.mlp\.down_proj \(2 columns, 17 tokens\)") as caught:
        with_damping(name, 0.01).prepare(indefinite)
    assert (caught.value.name, caught.value.count, caught.value.columns) == ("layers.3.mlp.down_proj", 17, 2)
    assert caught.value.damping == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_damping_reported_is_the_one_used(name: str) -> None:
    # Methods without a factorisation use none; a refit has a floor of its own.
    expected = 0.0 if name in ("magnitude", "wanda") else 0.01
    assert solve(name, weight(7, 300), gram(inputs(300)), Unstructured(0.5)).damping == expected


@every_solver
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    W_RC = weight(7, 300).clone()
    W_RC[2, 40] = bad
    with pytest.raises(InputError, match=r"blocks\.0\.fc1"):
        solve(name, W_RC, gram(inputs(300)), Unstructured(0.5))


@every_solver
@pytest.mark.parametrize("pattern", [NofM(4, 8), Given(torch.ones(7, 299, dtype=torch.bool))], ids=["4:8", "given"])
def test_a_shape_the_pattern_cannot_rule_is_refused(name: str, pattern: Pattern) -> None:
    # 8 rows × 300 columns is a multiple of 8 in all: without the check groups would run over the ends of rows.
    with pytest.raises(InputError):
        solve(name, weight(8, 300), gram(inputs(300)), pattern)
