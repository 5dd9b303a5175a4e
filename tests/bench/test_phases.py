"""Every moment belongs to one phase, and what is exchanged to see them is put back."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from obsprune.bench.phases import REST, Recorder, stage, whole
from obsprune.bench.probes import PROBES, watched
from obsprune.bench.work import Work


def ticking() -> Recorder:
    """A second passes between two looks at the clock."""
    ticks = itertools.count()
    return Recorder(lambda: float(next(ticks)))


def times(recorder: Recorder) -> dict[str, float]:
    return {name: phase.seconds for name, phase in recorder.phases.items()}


def test_the_innermost_phase_has_the_time_and_all_of_them_the_whole() -> None:
    recorder = ticking()
    with recorder.open("forward"):
        with recorder.open("Gram"):
            pass
        with recorder.open("Gram"):
            pass
    assert times(recorder) == {REST: 1, "forward": 3, "Gram": 2}
    assert recorder.phases["Gram"].calls == 2
    assert recorder.total == sum(times(recorder).values()) == 6


def test_a_stage_tells_its_phases_from_others_and_a_whole_swallows_them() -> None:
    recorder = ticking()
    with recorder.open("rounds", stage):
        with recorder.open("sweep"), recorder.open("Gram"):
            pass
        with recorder.open("judging", whole), recorder.open("forward"):
            pass
    with recorder.open("matching", whole), recorder.open("forward"), recorder.open("load", whole):
        pass
    assert times(recorder) == {
        REST: 2, "rounds": 3, "rounds: sweep": 2, "rounds: Gram": 1, "rounds: judging": 3, "matching": 5,
    }  # fmt: skip


def test_an_error_closes_a_phase() -> None:
    recorder = ticking()
    with pytest.raises(ValueError, match="gone wrong"), recorder.open("forward"):
        raise ValueError("gone wrong")
    with recorder.open("write"):
        pass
    assert times(recorder) == {REST: 2, "forward": 1, "write": 1}


def test_a_phase_says_its_share_of_the_limit() -> None:
    recorder = ticking()
    with recorder.open("Gram"):
        recorder.add(Work(Counter({"float32": 30})))
    tree = recorder.phases["Gram"].tree({"float32": 60.0})
    assert (tree["seconds"], tree["limit"], tree["share"], tree["flops"]) == (1, 0.5, 0.5, {"float32": 30})
    assert recorder.phases[REST].tree({})["share"] == 0


def test_what_is_watched_is_put_back_even_after_an_error() -> None:
    before = [vars(probe.owner)[probe.name] for probe in PROBES]
    with pytest.raises(RuntimeError), watched(ticking()):
        assert all(vars(p.owner)[p.name] is not real for p, real in zip(PROBES, before, strict=True))
        raise RuntimeError
    assert [vars(probe.owner)[probe.name] for probe in PROBES] == before
