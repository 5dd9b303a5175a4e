"""What is said before a run begins: how long it takes and what it needs; and what is refused then."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner
from zoo import PICTURED, Zoo

from obsprune import resources
from obsprune.cli import app
from obsprune.engine.footprint import shapes
from obsprune.engine.rehearsal import rehearse_forward
from obsprune.engine.short_walk import Line, count_kinds, kind_of_block, short_walk
from obsprune.errors import InputError
from obsprune.models.activations import trim_heap
from obsprune.models.load import load
from obsprune.outlook import Outlook, look_ahead
from obsprune.pipeline import prune
from obsprune.plan import make_plan, make_streams, run_facts
from obsprune.presets import layered
from obsprune.progress import Silent
from obsprune.ranks import Alone
from obsprune.recipe import make_recipe
from obsprune.report.memory import MemoryWatch, anonymous_bytes
from obsprune.resources import own_share, reckon

BEST = {
    "solver": {"name": "admm"}, "target": "stream", "matching": {"passes": 2, "steps": 2}, "iters": 2,
    "rounds": {"steps": 2}, "allocation": {"rules": ["knapsack"], "least": 0.5},
}  # fmt: skip


def recipe(model: Path | str, tokens: Path | None = None, **asked: Any) -> Any:
    data: dict[str, Any] = {"nsamples": 8, "heldout": 2, "seqlen": 32}
    data |= {"dataset": str(tokens)} if tokens else {}
    data |= asked.pop("data", {})
    return make_recipe({"model": {"name": str(model)}, "data": data, "evaluation": ["heldout"], **asked})


def outlook(asked: Any, folder: Path) -> Outlook:
    return look_ahead(asked, folder / "out", Silent())


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


# ---------------------------------------------------------------------------------------------------- lines and walks


def test_a_line_goes_through_both_points_and_never_below_nothing() -> None:
    assert Line.through((1, 3.0), (5, 11.0)) == Line(1.0, 2.0)
    assert Line.through((4, 8.0), (4, 8.0)) == Line(0.0, 2.0)  # one point: nothing is fixed
    assert Line.through((1, 5.0), (2, 3.0)) == Line(3.0, 0.0)  # noise
    assert Line.through((1, 1.0), (2, 4.0)) == Line(0.0, 3.0)
    assert Line(1.0, 2.0).at(10) == 21.0


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_blocks_alike_are_one_kind(zoo: Zoo, name: str) -> None:
    model = load(str(zoo(name)))
    assert list(count_kinds(model).values()) == [len(model.blocks)]
    assert list(count_kinds(load(str(zoo(name)), skip=[r"\.0\."])).values())[:1] == [1]  # the first has less to prune


@pytest.mark.parametrize("name", ["llama", "mixtral", "resnet-basic", "swin"])
def test_a_short_walk_loads_one_block_of_each_kind_and_reaches_the_end(zoo: Zoo, name: str, pictures: Path) -> None:
    model = load(str(zoo(name)))
    batch = (
        {"pixel_values": torch.zeros(1, 3, model.config.image_size, model.config.image_size)}
        if name in PICTURED and hasattr(model.config, "image_size")
        else {"pixel_values": torch.zeros(1, 3, 32, 32)}
        if name in PICTURED
        else {"input_ids": torch.arange(24)[None]}
    )
    visited, finished = [], []
    walk = model.walk([batch], lambda key, output: finished.append(tuple(output.logits.shape)))

    def visit(stop: Any, block: Any) -> dict[int, Any]:
        visited.append(kind_of_block(block))
        assert not any(parameter.is_meta for parameter in block.module.parameters())
        return {0: stop.run(0)}

    assert short_walk(model, walk, visit) > 0
    assert visited == list(count_kinds(model)) and len(finished) == 1
    assert all(p.is_meta for block in model.blocks for p in block.module.parameters())


def test_a_forward_is_timed_once_for_each_kind(zoo: Zoo) -> None:
    model, outputs = load(str(zoo("llama"))), []
    found = rehearse_forward(model, {"input_ids": torch.arange(24)[None]}, lambda key, output: outputs.append(key))
    assert found.blocks.keys() == count_kinds(model).keys() and outputs == [0, 0]
    assert all(0 < seconds < 10 for seconds in [found.outside, *found.blocks.values()])


# ---------------------------------------------------------------------------------------------------- what is foretold


def test_every_stage_is_foretold_and_the_model_is_left_as_it_was(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    found = outlook(recipe(zoo("llama"), tokens, **BEST), tmp_path)
    assert found.forecast is not None and found.forecast.unknown == []
    stages = {"preparation", "pruning", "allocation", "rounds", "evaluation", "writing"}
    assert found.forecast.seconds.keys() == stages
    assert all(math.isfinite(value) and value > 0 for value in found.forecast.seconds.values())
    assert all(p.is_meta for block in found.plan.model.blocks for p in block.module.parameters())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mixtral", "resnet-basic"])
def test_experts_and_convolutions_are_foretold(
    zoo: Zoo, tokens: Path, pictures: Path, tmp_path: Path, name: str
) -> None:
    data = {"dataset": f"imagenet={pictures}"} if name in PICTURED else {}
    found = outlook(recipe(zoo(name), tokens, data=data, experts={"starved": "skip"}), tmp_path)
    assert found.forecast is not None and found.forecast.total > 0
    assert [len(block.matrices) for block in found.plan.model.blocks] == [
        len(block.matrices) for block in load(str(zoo(name))).blocks
    ]


def test_twice_the_samples_take_more(zoo: Zoo, tmp_path: Path) -> None:
    def with_samples(count: int) -> Outlook:
        return outlook(recipe("demo", data={"nsamples": count, "heldout": 8, "seqlen": 256}), tmp_path)

    few, many = with_samples(32), with_samples(128)
    assert few.forecast and many.forecast
    assert many.forecast.seconds["pruning"] > 1.5 * few.forecast.seconds["pruning"]
    assert many.needs.stages["pruning"].device > few.needs.stages["pruning"].device


def test_more_steps_sizes_and_levels_take_more(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # a tick a look: no noise

    def seconds(**asked: Any) -> dict[str, float]:
        found = outlook(recipe(zoo("llama"), tokens, **asked), tmp_path).forecast
        assert found is not None
        return found.seconds

    one, two, three = (seconds(iters=count, rounds={"steps": 2})["rounds"] for count in (2, 3, 4))
    assert 0 < two - one < one  # later rounds search no learning rate and try fewer step sizes
    assert three - two == pytest.approx(two - one)
    still = seconds(iters=2, rounds={"tune": "none", "step": "none"})["rounds"]
    assert still < seconds(iters=2, rounds={"tune": "none"})["rounds"] < one
    knapsack, owl = (seconds(sparsity=0.7, allocation={"rules": [rule]})["allocation"] for rule in ("knapsack", "owl"))
    assert knapsack > owl > 0


def test_what_cannot_be_tried_is_said_and_the_rest_told(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: Any) -> None:
        raise InputError("too few tokens")

    monkeypatch.setattr("obsprune.outlook.forecast", refuse)
    found = outlook(recipe(zoo("llama"), tokens), tmp_path)
    assert found.forecast is None and "cannot be tried: too few tokens" in found.notices[-1]
    result = invoke("prune", zoo("llama"), "--dataset", tokens, "--nsamples", 4, "--seqlen", 32, "--dry-run")
    assert result.exit_code == 0 and "cannot be tried" in result.stderr and "host memory" in result.stderr


def test_a_folder_that_cannot_be_written_is_said(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**words: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("obsprune.forecast.tempfile.TemporaryFile", refuse)
    notice = outlook(recipe(zoo("llama"), tokens), tmp_path).notices[-1]
    assert f"cannot write in {tmp_path}: Read-only file system" in notice


# ---------------------------------------------------------------------------------------------------- memory and disk


def test_shapes_are_those_of_the_blocks(zoo: Zoo, tokens: Path) -> None:
    plan = make_plan(recipe(zoo("llama"), tokens))
    (found,) = shapes(plan.model, plan.model.batches(plan.draw.calibration.take([0]), 1)[0]).values()
    block = plan.model.blocks[0]
    assert found.elements == sum(p.numel() for p in block.module.parameters())
    assert found.prunable == sum(m.shape[0] * m.shape[1] for m in block.matrices)
    widths = sorted(group[0][1] for side in found.groups for group in side)
    d, f = plan.model.config.hidden_size, plan.model.config.intermediate_size
    assert widths == sorted([d, d, d, f]) and found.grams(1) == [
        4 * group[0][1] ** 2 for s in found.groups for group in s
    ]
    assert found.one_stream(False, 10**12) == 4 * (3 * d * d + f * f)
    assert found.one_stream(False, 0) == 4 * max(d, f) ** 2  # one Gram at least
    assert found.call >= 32 * d * plan.model.dtype.itemsize and found.graph > found.call


def test_dry_run_and_run_refuse_what_does_not_fit(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("prune", zoo("llama"), "--dataset", tokens, "--nsamples", 4, "--seqlen", 32, "-o", tmp_path / "out")
    monkeypatch.setattr(resources, "free_bytes", lambda device: 1000)
    for dry in ((), ("--dry-run",)):
        result = invoke(*words, *dry)
        assert result.exit_code == 2, result.output
        for phrase in ("needs about", "GB of host memory", "can be had", "--batch-size", "--activations disk"):
            assert phrase in result.output
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for dry in ((), ("--dry-run",)):
        result = invoke(*words, *dry)
        assert result.exit_code == 2 and "choose another -o" in result.output and "GB of disk" in result.output
    assert list(tmp_path.iterdir()) == []


def test_activations_on_disk_are_counted_there(zoo: Zoo, tokens: Path) -> None:
    plan = make_plan(recipe(zoo("llama"), tokens, target="stream"))
    here = reckon(plan, []).stages["pruning"]
    plan = make_plan(recipe(zoo("llama"), tokens, target="stream", engine={"activations": "disk"}))
    there = reckon(plan, []).stages["pruning"]
    assert there.disk > 0 == here.disk and there.device + there.disk == here.device


def test_rounds_in_files_need_disk_instead_of_memory(zoo: Zoo, tokens: Path) -> None:
    def rounds(memory: str) -> Any:
        plan = make_plan(recipe(zoo("llama"), tokens, iters=2, rounds={"memory": memory}))
        return plan, reckon(plan, []).stages["rounds"]

    (plan, device), (_, host), (_, disk) = map(rounds, ("device", "host", "disk"))
    stores = plan.bytes_a_weight * sum(m.shape[0] * m.shape[1] for m in plan.model.matrices)
    assert plan.bytes_a_weight == 9 * plan.model.dtype.itemsize + 12
    assert (host.host, disk.disk) == (stores, stores) and device.device > stores


@pytest.mark.parametrize(("target", "nsamples"), [("own", 2000), ("stream", 800)])
def test_peak_memory_is_foretold_where_activations_are_large(
    zoo: Zoo, tmp_path: Path, target: str, nsamples: int
) -> None:
    ids = torch.randint(0, 90, (260, 64), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids.repeat(8, 1)}, tmp_path / "ids.safetensors")
    asked = recipe(
        zoo("llama"), tmp_path / "ids.safetensors", evaluation=["none"],
        data={"nsamples": nsamples, "heldout": 16, "seqlen": 64}, engine={"activations": "device"}, target=target,
    )  # fmt: skip
    gc.collect()
    trim_heap()  # what earlier tests have freed
    before, expected = anonymous_bytes(), reckon(make_plan(asked), [])
    most = prune(asked, tmp_path / "out", Silent())["memory"]["host_bytes"]
    assert most - before > 30e6  # else nothing is shown
    assert 1 / 1.5 < expected.host / most < 1.5


def test_the_watch_sees_what_was_there_for_a_moment() -> None:
    before = anonymous_bytes()
    with MemoryWatch() as watch:
        held = torch.ones(2**25)  # 128 MiB
        time.sleep(0.1)
        del held
    assert 2**27 * 0.9 < watch.peak["host_bytes"] - before < 2**27 * 1.5
    assert "device_bytes" not in watch.peak or torch.cuda.is_available()


def test_where_things_live_may_change_when_a_run_is_continued(zoo: Zoo, tokens: Path) -> None:
    facts = [
        run_facts(make_plan(recipe(zoo("llama"), tokens, **asked)))
        for asked in ({}, {"engine": {"activations": "disk"}}, {"rounds": {"memory": "disk"}}, {"seed": 1})
    ]
    assert facts[0] == facts[1] == facts[2] != facts[3]


# ---------------------------------------------------------------------------------------------------- several processes


class Second(Alone):
    """One of two processes, which never meet."""

    rank, size = 1, 2


def test_a_process_of_two_plans_for_its_share(zoo: Zoo, tokens: Path) -> None:
    plan = make_plan(recipe(zoo("llama"), tokens, target="stream"), ranks=Second())
    mine = own_share(plan)
    assert (len(plan.draw.calibration), len(mine.draw.calibration), len(mine.draw.heldout)) == (8, 4, 1)
    assert mine.model.ranks.size == 1 and len(make_streams(mine, 1).batches) == 4


# ---------------------------------------------------------------------------------------------------- what is shown


def test_a_line_stands_for_all_matrices_of_a_kind(zoo: Zoo, tokens: Path) -> None:
    words = ("prune", zoo("llama"), "--dataset", tokens, "--nsamples", 4, "--seqlen", 32, "--dry-run")
    shown = " ".join(invoke(*words).stderr.split())
    assert shown.count("q_proj") == 1 and "model.layers.*.self_attn.q_proj" in shown
    for phrase in ("time", "preparation", "host memory", "disk", "blocks"):
        assert phrase in shown
    machine = json.loads(invoke(*words, "--json").stdout)
    assert sum("q_proj" in matrix["name"] for matrix in machine["matrices"]) > 1
    assert machine["seconds"]["total"] > 0 and machine["memory"]["host_bytes"] < machine["free"]["host_bytes"]
    assert machine["notices"] is not None and "recipe" in machine


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_the_demo_takes_about_as_long_as_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # other workers keep the machine busy
    asked = make_recipe(*layered(preset, {}, {"model": {"name": "demo"}, "evaluation": ["heldout"]}))
    expected = outlook(asked, tmp_path).forecast
    spent = prune(asked, tmp_path / "out", Silent())["seconds"]
    assert expected is not None
    assert 1 / 3 < expected.total / spent["total"] < 3
    assert 1 / 3 < expected.seconds["pruning"] / spent["pruning"] < 3
