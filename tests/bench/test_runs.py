"""A bench of a tiny shape, for real: phases, ceilings, what it needs, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from obsprune import pipeline
from obsprune.bench import runs
from obsprune.bench.ceilings import Sizes, _product_rate, measure
from obsprune.bench.probes import PROBES
from obsprune.bench.runs import METHODS, USUAL, Asked, Outlook, bench, outlook
from obsprune.bench.scratch import scratch
from obsprune.core.products import matmul_settings
from obsprune.errors import InputError
from obsprune.models.shapes import SHAPES
from obsprune.progress import Silent
from obsprune.resources import Bytes, Free, Needs

SMALL = {"data": {"nsamples": 6, "heldout": 3, "seqlen": 32}}
SIZES = Sizes(64, 2**16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["llama-2-7b"].reduced, dtype="float32"))


def asked(folder: Path, *methods: str, **more: Any) -> Asked:
    return Asked("tiny", methods, "cpu", settings=[SMALL], workdir=folder, sizes=SIZES, **more)


@pytest.mark.parametrize("method", METHODS)
def test_phases_are_the_whole(method: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    found = bench(asked(tmp_path, method), Silent())
    passed = time.perf_counter() - start
    (one,) = found["methods"]
    times = {phase["phase"]: phase["seconds"] for phase in one["phases"]}
    assert sum(times.values()) == pytest.approx(one["seconds"]) and one["seconds"] < passed
    assert times["rest"] < 0.5 * one["seconds"]
    assert {"load", "forward", "Gram", "factor", "losses", "write", "preparation", "evaluation: forward"} <= set(times)
    assert all(phase["share"] == pytest.approx(phase["limit"] / phase["seconds"]) for phase in one["phases"])
    assert sum(phase["limit"] > 0 for phase in one["phases"]) >= 5
    assert one["scaled_seconds"] == pytest.approx(one["seconds"])
    assert one["memory"]["host_bytes"] > 0 and 0 < one["error"] < 1
    assert json.loads(json.dumps(found)) == found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_probe_is_met(tmp_path: Path) -> None:
    """Whoever renames what a probe is put around sees it here."""
    own: list[dict[str, Any]] = [SMALL, {"sparsity": 0.7}]
    found = bench(replace(asked(tmp_path, "fast", "iobs", "best"), settings=own), Silent())
    met = {phase["phase"].rpartition(": ")[2] for one in found["methods"] for phase in one["phases"]}
    assert {probe.phase for probe in PROBES} <= met
    for one in found["methods"]:
        flops = {phase["phase"]: sum(phase["flops"].values()) for phase in one["phases"]}
        for phase in ("forward", "Gram", "factor", "sweep", "ADMM", "matching", "rounds: gradients"):
            assert flops.get(phase, 1) > 0, phase


def test_the_forward_of_a_run_does_what_was_foretold(tmp_path: Path) -> None:
    """One stream: all samples pass each block to be measured, and all but the last once more."""
    plan, found = outlook(asked(tmp_path, "sparsegpt"), Silent()), bench(asked(tmp_path, "sparsegpt"), Silent())
    phases = {phase["phase"]: phase for phase in found["methods"][0]["phases"]}
    tokens, d, f = 6 * 32, 16, 32
    matrices = 4 * d * d + 3 * d * f
    assert plan["flops"]["forward"] == 2 * 2 * tokens * matrices
    gram, sweep = 2 * tokens * (3 * d * (d + 1) + f * (f + 1)), 2 * (4 * d**3 + 2 * f * d**2 + d * f**2)
    assert plan["flops"]["Gram"] == gram == sum(phases["Gram"]["flops"].values())
    assert plan["flops"]["sweep"] == sweep == sum(phases["sweep"]["flops"].values())
    assert plan["flops"]["factor"] == pytest.approx(2 * (3 * d**3 + f**3) / 3, rel=1e-3)
    assert sum(phases["forward"]["flops"].values()) > 1.5 * plan["flops"]["forward"]


def test_a_pass_is_foretold_once_for_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, plans = runs.one_pass, list[Any]()
    monkeypatch.setattr(runs, "one_pass", lambda plan: plans.append(plan) or real(plan))  # type: ignore[func-returns-value]
    found = outlook(asked(tmp_path, "sparsegpt", "best"), Silent())
    assert len(plans) == 1 and found["flops"] == outlook(asked(tmp_path, "sparsegpt"), Silent())["flops"]


def test_a_few_blocks_are_scaled_to_all(tmp_path: Path) -> None:
    found = bench(asked(tmp_path, "sparsegpt", blocks=1), Silent())
    (one,) = found["methods"]
    assert (found["blocks"], found["of"]) == (1, 2)
    own = ("preparation", "opening", "evaluation")
    once = sum(phase["seconds"] for phase in one["phases"] if phase["phase"] in own)
    assert one["scaled_seconds"] == pytest.approx(2 * one["seconds"] - once)


def test_what_is_known_is_told_after_each_method(tmp_path: Path) -> None:
    told: list[int] = []
    bench(asked(tmp_path, "sparsegpt", "fast"), Silent(), lambda found: told.append(len(found["methods"])))
    assert told == [1, 2]


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"methods": ("sparsgpt",)}, "unknown method 'sparsgpt'; did you mean sparsegpt"),
        ({"shape": "llama-2"}, "unknown shape 'llama-2'; did you mean"),
        ({"blocks": 9}, "9 blocks of .* cannot be had; 1 to 2 can"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"settings": [{"data": {"seqlen": 1}}]}, "--seqlen 1"),
        ({"settings": [{"model": {"name": "demo"}}]}, "bench has its own model.name"),
        ({"settings": [{"data": {"dataset": "demo"}}]}, "bench has its own data.dataset"),
        ({"settings": [{}, {"engine": {"device": "cpu"}}]}, "bench has its own engine.device"),
        (
            {"workdir": Path("/nowhere")},
            "cannot write in /nowhere: No such file or directory; choose another --workdir",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_and_leaves_nothing(wish: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        bench(replace(asked(tmp_path, "sparsegpt"), **wish), Silent())
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_with_numbers_and_a_way_out() -> None:
    needs = Needs(Bytes(0), {"pruning": Bytes(int(8e9), int(3e9))}, int(13e9), on_host=False)
    enough = Free(int(4e9), int(9e9), int(40e9), Path())
    ready = Outlook(int(13e9), {"best": needs, "fast": replace(needs, written=int(2e9))}, enough, {})
    both = Asked(methods=("best", "fast"))
    assert ready.possible(both) == (["best", "fast"], {})
    for part, said in (
        (
            {"disk": int(20e9)},
            "best needs 27.3 GB of disk, and 20 GB can be had; take fewer --blocks, another --workdir",
        ),
        ({"host": int(2e9)}, "best needs 3 GB of host memory, and 2 GB can be had; take fewer --blocks"),
        ({"device": int(7e9)}, "best needs 8 GB of device memory, and 7 GB can be had; .* or name other methods"),
    ):
        with pytest.raises(InputError, match=said):
            replace(ready, free=replace(enough, **part)).possible(both)  # type: ignore[arg-type]


def test_of_methods_that_nobody_named_those_without_room_are_left_out() -> None:
    small, large = (Needs(Bytes(0), {"pruning": Bytes(size)}, 0, on_host=True) for size in (int(1e9), int(9e9)))
    needs = {"sparsegpt": small, "balanced": small, "iobs": large, "best": large}
    ready = Outlook(0, needs, Free(int(4e9), 0, 1, Path()), {})
    methods, lacking = ready.possible(Asked())
    assert methods == ["sparsegpt", "balanced"] and list(lacking) == ["iobs", "best"]
    assert "best needs 9 GB of host memory" in lacking["best"]
    with pytest.raises(InputError, match="sparsegpt needs"):
        replace(ready, free=Free(1, 0, 1, Path())).possible(Asked())


def test_too_little_disk_is_known_before_a_weight_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "free_at", lambda plan, path: Free(int(1e12), int(1e12), 1000, path))
    monkeypatch.setattr(type(SHAPES["tiny"]), "filled", lambda *_: pytest.fail("weights were made"))
    with pytest.raises(InputError, match="GB of disk, and"):
        bench(asked(tmp_path, "sparsegpt"), Silent())
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        assert any(tmp_path.glob("*/dense/model-*.safetensors"))
        raise RuntimeError("in the middle")

    monkeypatch.setattr(pipeline, "prune_once", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        bench(asked(tmp_path, "sparsegpt"), Silent())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_stays_after_a_kill(sign: int, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from obsprune.bench.scratch import scratch\n"
        "with scratch(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights').write_bytes(bytes(1000)); print(folder, flush=True)\n"
        "    os.kill(os.getpid(), int(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, str(int(sign))], capture_output=True, text=True)
    assert done.returncode == -sign and str(tmp_path) in done.stdout
    until = time.monotonic() + 30
    while list(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_scratch_is_there_while_open(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        assert folder.parent == tmp_path and os.access(folder, os.W_OK)
    assert list(tmp_path.iterdir()) == []


def test_ceilings_of_a_cpu(tmp_path: Path) -> None:
    found = measure(torch.device("cpu"), tmp_path, Silent(), SIZES)
    assert set(found) == {"float32", "bfloat16", "float64", "memory", "file written", "file read"}
    assert all(rate > 0 for rate in found.values()) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "precision"), [("float32", "ieee"), ("tf32", "tf32")])
def test_a_ceiling_has_the_precision_of_its_name(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = set[str](), torch.mm

    def mm(*args: Any, **more: Any) -> torch.Tensor:
        seen.add(torch.backends.cuda.matmul.fp32_precision)
        return real(*args, **more)

    monkeypatch.setattr(torch, "mm", mm)
    other = "ieee" if precision == "tf32" else "tf32"
    with matmul_settings(fp32_precision=other):
        assert _product_rate(name, torch.device("cpu"), 8) > 0
        assert torch.backends.cuda.matmul.fp32_precision == other
    assert seen == {precision}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    found = bench(replace(asked(tmp_path, *USUAL), device="cuda", sizes=Sizes(1024, 2**24)), Silent())
    assert {"tf32", "float16", "to the device"} <= set(found["ceilings"])
    for one in found["methods"]:
        assert one["memory"]["device_bytes"] > 0
        assert any(phase["limit"] > 0 for phase in one["phases"])
