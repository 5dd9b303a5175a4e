"""Whatever ends a run, the same command again ends with the same bytes as a run that nothing ended."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import KILLED, End, Forks
from kills import POINTS, PRUNED, WRITE, Bench, Stories
from safetensors.torch import save_file
from zoo import Zoo, token_rows, tokens_in

from obsprune import pipeline
from obsprune.errors import InputError
from obsprune.progress import Silent
from obsprune.recipe import make_recipe

QUICK = (
    "inside a matrix",
    "between a shard's file and its name",
    "inside a line of the journal",
    "inside the config",
    "between two dense files",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Forks() as forks:
        yield Bench(tmp_path_factory.mktemp("bench"), forks)


def check(bench: Bench, stories: Stories) -> None:
    for name, (told, same) in bench.tried(stories).items():
        ends = len(stories[name][1])
        assert told.status == [KILLED] * ends + [0], (name, told)
        assert same, name


def test_killed_runs_end_with_the_same_bytes(bench: Bench) -> None:
    check(bench, {name: POINTS[name] for name in QUICK})


@pytest.mark.slow
def test_killed_anywhere(bench: Bench) -> None:
    check(bench, {name: point for name, point in POINTS.items() if name not in QUICK})


@pytest.mark.slow
def test_killed_at_random(bench: Bench) -> None:
    """Eight runs; scripts/reliability.py tries as many as it is asked to."""
    killed = 0
    for name, (told, same) in bench.tried_at_random(8).items():
        killed += told.status.count(KILLED)
        assert same, (name, told)
    assert killed >= 8


@pytest.mark.slow
def test_a_checkpoint_narrower_than_its_computation(bench: Bench, tmp_path: Path) -> None:
    """What goes on to the next block is what was stored, not what it was rounded from."""
    story = {"float16": ("two streams and matching", [End(PRUNED, 9)])}
    told, same = Bench(tmp_path, bench.forks, torch.float16).tried(story)["float16"]
    assert told.status == [KILLED, 0] and same, told


ROOMS = {"activations": 1500, "a shard": 30_000, "a round's scratch": 60_000}


@pytest.mark.slow
def test_a_full_disk_is_another_kill(bench: Bench) -> None:
    stories = {name: ("rounds on disk", [End(room=room)]) for name, room in ROOMS.items()}
    for name, (told, same) in bench.tried(stories).items():
        assert told.status == [2, 0] and same, (name, told)
        assert told.stderr[0].startswith("error: cannot ") and told.stderr[0].count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_cleanly(bench: Bench, sign: int, code: int) -> None:
    ends = {
        "before the first block": End(PRUNED, 1, sign=sign),
        "later": End(PRUNED, 6, sign=sign),
        "inside a write": End(WRITE, 3, share=0.5, sign=sign),
        "inside the model": End("obsprune.models.walk:Walk.resume", 12, sign=sign),
    }
    for name, (told, same) in bench.tried(
        {f"{code}: {name}": ("one shot", [end]) for name, end in ends.items()}
    ).items():
        assert told.status == [code, 0] and same, (name, told)
        assert told.stderr[0] == "error: stopped; repeat the same command to go on\n"


Prune = Callable[..., Any]


@pytest.fixture
def prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prune:
    """Carries out a small run in this process, with these settings."""
    model, tokens = Zoo(tmp_path)("llama"), tokens_in(tmp_path)
    common = {"model": {"name": str(model)}, "data": {"dataset": str(tokens), "nsamples": 2, "heldout": 2}}

    def run(**settings: Any) -> Any:
        recipe = make_recipe(common, {"evaluation": ["heldout"]}, settings)
        return pipeline.prune(recipe, tmp_path / "out", Silent())

    return run


def ended(prune: Prune, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Ends a run when its blocks are pruned."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "evaluate_result", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(**settings)


@pytest.fixture
def unfinished(prune: Prune, monkeypatch: pytest.MonkeyPatch) -> Prune:
    """Continues, with other settings, a run that was ended when its blocks were pruned."""
    ended(prune, monkeypatch)
    return prune


def test_rounds_go_on_when_their_iterates_are_gone(prune: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"iters": 2, "rounds": {"steps": 2}}
    ended(prune, monkeypatch, **settings)
    assert prune(**settings)["rounds"][1]["kept"]


def test_what_is_evaluated_and_where_things_live_may_change(unfinished: Prune, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    report = unfinished(evaluation=["none"], engine={"activations": "disk"}, rounds={"memory": "disk"})
    assert report["evaluation"] == {} and len(before) == 4
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}


def test_another_recipe_is_refused(unfinished: Prune) -> None:
    with pytest.raises(InputError, match=r"another recipe \(sparsity: 0\.5 -> 0\.6\)"):
        unfinished(sparsity=0.6)


def test_another_dataset_is_refused(unfinished: Prune, tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    save_file({"input_ids": token_rows(24) // 2}, path)
    with pytest.raises(InputError, match=r"(calibration|heldout)_sha256: \w+ -> \w+"):
        unfinished()


def test_another_model_is_refused(unfinished: Prune, tmp_path: Path) -> None:
    path = next(tmp_path.glob("**/model.safetensors"))
    path.write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"checkpoint\.model\.safetensors: \[\d+, \d+\] -> \[\d+, \d+\]"):
        unfinished()


def test_another_config_is_refused(unfinished: Prune, tmp_path: Path) -> None:
    path = next(path for path in tmp_path.glob("**/config.json") if "out" not in path.parts)
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(InputError, match=r"config: \w+ -> \w+"):
        unfinished()


def test_another_version_is_refused(unfinished: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsprune.plan.__version__", "9.9")
    with pytest.raises(InputError, match=r"obsprune: [\w.]+ -> 9\.9"):
        unfinished()
