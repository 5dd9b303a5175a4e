"""What processes tell each other, on gloo: sums, copies, errors, and the end of one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Ended, together

from obsprune.engine.distributed import alone, processes
from obsprune.errors import InputError, NotPositiveDefinite, ObspruneError
from obsprune.ranks import ALONE, Ranks


def run(size: int, work: Callable[[Ranks], Any], folder: Path) -> list[Ended]:
    def inside() -> Any:
        with processes() as ranks:
            return work(ranks)

    return together(size, inside, folder)


def values(size: int, work: Callable[[Ranks], Any], folder: Path) -> list[Any]:
    ended = run(size, work, folder)
    assert [one.code for one in ended] == [0] * size, ended
    return [one.value for one in ended]


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_copies(tmp_path: Path, size: int) -> None:
    def work(ranks: Ranks) -> Any:
        mine = torch.arange(6.0).reshape(2, 3) + ranks.rank
        everywhere, turned, one, small = mine.clone(), mine.clone().T, mine.clone(), torch.ones(2).bfloat16()
        ranks.sum([everywhere, turned])
        ranks.sum([one], {1})
        given = mine.clone().T.to(torch.bfloat16)
        ranks.give(given, 1)
        ranks.give(small[0])
        return everywhere.tolist(), turned.tolist(), one.tolist() if ranks.rank == 1 else None, given.tolist()

    total = size * torch.arange(6.0).reshape(2, 3) + sum(range(size))
    for rank, (everywhere, turned, one, given) in enumerate(values(size, work, tmp_path)):
        assert everywhere == total.tolist() and turned == total.T.tolist()
        assert one == (total.tolist() if rank == 1 else None)
        assert given == (torch.arange(6.0).reshape(2, 3) + 1).T.tolist()


def test_what_is_told(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        return ranks.gather(ranks.rank), ranks.told(lambda: ranks.rank), ranks.agree(lambda: ranks.rank), ranks.first

    assert values(2, work, tmp_path) == [([0, 1], 0, 0, True), ([0, 1], 0, 1, False)]


def failing(error: ObspruneError) -> Any:
    raise error


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_of_one_is_raised_in_all(tmp_path: Path, culprit: int) -> None:
    def work(ranks: Ranks) -> Any:
        with pytest.raises(NotPositiveDefinite, match=r"of layer \(4 columns, 9 tokens\)") as caught:
            mine = ranks.rank == culprit
            ranks.agree(lambda: failing(NotPositiveDefinite("layer", 9, 4, 0.1)) if mine else None)
        with pytest.raises(InputError, match="no such file"):
            ranks.told(lambda: failing(InputError("no such file")))
        return caught.value.shared, caught.value.columns

    assert values(2, work, tmp_path) == [(True, 4), (True, 4)]


def test_the_end_of_one_is_told_by_the_other(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        if not ranks.first:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(ObspruneError, match=r"another process of this run has ended.*repeat the same command"):
            ranks.sum([torch.ones(3)])
        return "told"

    first, second = run(2, work, tmp_path)
    assert second.code == -signal.SIGKILL
    assert first.value == "told"


def test_without_a_launcher_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes() as ranks:
        assert ranks is ALONE
    alone("anything")


def test_accelerate_that_starts_one_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with processes() as ranks:  # asked for one: no address of a master
        assert ranks is ALONE
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match=r"has started one.*torchrun"), processes():
        pass


def test_a_launcher_that_tells_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"WORLD_SIZE is 2, and MASTER_ADDR, MASTER_PORT, RANK not set"), processes():
        pass


def test_one_gpu_is_not_shared(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Any:
        with pytest.raises(InputError, match="2 processes cannot share cuda:1"):
            ranks.device("cuda:1")
        device = ranks.device("cpu")
        ranks.gather(None)  # who ends while the other still connects breaks its connection
        return device

    assert values(2, work, tmp_path) == ["cpu", "cpu"]


def test_what_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="train-prune works in one process, and 2 were started"):
        alone("train-prune")
