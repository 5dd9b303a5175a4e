"""Two and three processes on one model: what one process does, but for the rounding of sums."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import Ended, together
from zoo import Zoo, tensors

from obsprune import pipeline, plan
from obsprune.engine.distributed import processes
from obsprune.engine.rundir import RunDir
from obsprune.errors import InputError
from obsprune.eval_pipeline import evaluate_checkpoint
from obsprune.models import load as load_module
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.ranks import ALONE, Ranks
from obsprune.recipe import make_recipe

STREAM = {"target": "stream", "solver": {"name": "sparsegpt"}}
SETTINGS: dict[str, dict[str, Any]] = {
    "sparsegpt": {},
    "2:4": {"pattern": "2:4"},
    "sequential": {"engine": {"true_sequential": True}, "solver": {"name": "wanda"}},
    "stream": STREAM,
    "admm": {"solver": {"name": "admm"}},
    "compensated": {"solver": {"name": "sparsegpt", "compensate": True}},
}


def recipe(source: Path, tokens: Path, settings: dict[str, Any]) -> Any:
    data = {"dataset": str(tokens), "nsamples": 14, "seqlen": 32, "heldout": 7}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["heldout"]}
    return make_recipe(tree, {"engine": {"batch_size": 3}}, settings)


def pruned(source: Path, tokens: Path, output: Path, settings: dict[str, Any], ranks: Ranks = ALONE) -> dict[str, Any]:
    return prune(recipe(source, tokens, settings), output, Silent(), ranks=ranks)


def in_processes(size: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Ended]:
    def inside() -> Any:
        with processes() as ranks:
            return work(ranks)

    return together(size, inside, folder)


def pruned_by(size: int, source: Path, tokens: Path, output: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of all processes."""
    ended = in_processes(size, output.parent / "said", lambda ranks: pruned(source, tokens, output, settings, ranks))
    assert [one.code for one in ended] == [0] * size, ended
    return [one.value for one in ended]


def perplexity(report: dict[str, Any]) -> float:
    return float(report["evaluation"]["heldout"]["pruned"]["perplexity"])


def differing_zeros(one: Path, other: Path) -> float:
    """The share of all weights that are zero in one and not in the other."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    different = sum(int(((first[key] == 0) != (second[key] == 0)).sum()) for key in first)
    return different / sum(tensor.numel() for tensor in first.values())


@pytest.mark.parametrize(
    ("family", "setting", "size"),
    [
        *(("llama", setting, 2) for setting in SETTINGS),
        ("opt", "compensated", 2),
        ("gpt2", "2:4", 3),
        ("llama", "stream", 3),
        ("qwen2_moe", "sparsegpt", 2),
        ("qwen2_moe", "stream", 3),
    ],
)
def test_the_result_is_that_of_one_process(
    zoo: Zoo, tokens: Path, tmp_path: Path, family: str, setting: str, size: int
) -> None:
    settings = SETTINGS[setting]
    alone = pruned(zoo(family), tokens, tmp_path / "alone", settings)
    reports = pruned_by(size, zoo(family), tokens, tmp_path / "out", settings)
    assert all(report["matrices"] == reports[0]["matrices"] for report in reports)
    assert differing_zeros(tmp_path / "alone", tmp_path / "out") < 1e-4
    assert perplexity(reports[0]) == pytest.approx(perplexity(alone), rel=1e-3)
    told = [(m["name"], m["zeros"], m["tokens"]) for m in reports[0]["matrices"]]
    assert told == [(m["name"], m["zeros"], m["tokens"]) for m in alone["matrices"]]
    for ours, theirs in zip(reports[0]["matrices"], alone["matrices"], strict=True):
        assert ours["error"] == pytest.approx(theirs["error"], rel=2e-2, abs=1e-6)
        assert ours["correction"] == pytest.approx(theirs["correction"], abs=2e-2)


LEARNED: dict[str, dict[str, Any]] = {
    "balanced": {"target": "stream", "solver": {"name": "admm"}, "matching": {"passes": 2}},
    "rounds": {"iters": 2},
    "rounds on disk, free": {"iters": 2, "rounds": {"tune": "free", "memory": "disk", "steps": 4}},
    "local rounds": {"iters": 2, "rounds": {"tune": "none", "step": "local"}},
    "allocation": {"sparsity": 0.7, "allocation": {"rules": ["owl", "importance", "knapsack"]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", LEARNED)
def test_what_is_learned_together(zoo: Zoo, tokens: Path, tmp_path: Path, setting: str) -> None:
    """Adam, and ADMM with targets that are nearly as good elsewhere, make much of little differences: another batch
    size does as much to the masks of one process. The model is as good, and all processes have the same one.
    """
    settings = LEARNED[setting]
    alone = pruned(zoo("llama"), tokens, tmp_path / "alone", settings)
    reports = pruned_by(2, zoo("llama"), tokens, tmp_path / "out", settings)
    assert differing_zeros(tmp_path / "alone", tmp_path / "out") < 0.02
    assert perplexity(reports[0]) == pytest.approx(perplexity(alone), rel=5e-3)
    assert reports[0]["rounds"] == reports[1]["rounds"]
    assert len(reports[0]["rounds"]) == len(alone["rounds"])
    assert (reports[0]["allocation"] or {}).get("rule") == (alone["allocation"] or {}).get("rule")


@pytest.mark.parametrize("family", ["resnet-basic", "vit"])
def test_classifiers(zoo: Zoo, pictures: Path, tmp_path: Path, family: str) -> None:
    tree = {
        "model": {"name": str(zoo(family))},
        "data": {"dataset": f"imagenet={pictures}", "nsamples": 8, "heldout": 5},
        "engine": {"reestimate_norms": True},
        "evaluation": ["heldout"],
    }
    alone = prune(make_recipe(tree), tmp_path / "alone", Silent())
    work = partial(prune, make_recipe(tree), tmp_path / "out", Silent())
    ended = in_processes(2, tmp_path / "said", lambda ranks: work(ranks=ranks))
    assert [one.code for one in ended] == [0, 0], ended
    assert differing_zeros(tmp_path / "alone", tmp_path / "out") < 1e-4
    ours, theirs = (report["evaluation"]["heldout"]["pruned"] for report in (ended[0].value, alone))
    assert ours["images"] == theirs["images"] == 5
    assert ours["top1"] == theirs["top1"]
    assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-4)


def test_evaluation_is_shared(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    pruned(zoo("llama"), tokens, tmp_path / "out", {})
    alone = evaluate_checkpoint(str(tmp_path / "out"), [], Silent())
    score = partial(evaluate_checkpoint, str(tmp_path / "out"), [], Silent())
    ended = in_processes(3, tmp_path / "said", lambda ranks: score(ranks=ranks))
    for one in ended:
        ours, theirs = (found["tasks"]["heldout"]["model"] for found in (one.value, alone))
        assert ours["predicted_tokens"] == theirs["predicted_tokens"]
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-6)


@pytest.mark.slow
def test_mmlu_and_images_are_shared(assets: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    asked = {
        "stories260k": (f"mmlu={assets / 'mmlu'}", 1),
        "deit-tiny": (f"imagenet={assets / 'imagenet-sample/labels.tsv'}", 5),
    }
    for name, (task, how_many) in asked.items():
        score = partial(evaluate_checkpoint, str(assets / name), [task], Silent(), limit=how_many, num_fewshot=0)
        (alone,) = score()["tasks"].values()
        ended = in_processes(2, tmp_path / name, lambda ranks, score=score: score(ranks=ranks))
        assert [one.code for one in ended] == [0, 0], ended
        for one in ended:
            (ours,) = one.value["tasks"].values()
            changing = ("images_per_second", "cross_entropy", "cross_entropy_stderr")
            same = {key: value for key, value in ours["model"].items() if key not in changing}
            assert same == {key: value for key, value in alone["model"].items() if key not in changing}


class Killed(BaseException):
    """As sudden as a signal."""


def killed_after_one_block(source: Path, tokens: Path, output: Path, ranks: Ranks) -> None:
    commit, done = RunDir.commit, list[str]()

    def fragile(self: RunDir, block: str, *rest: Any, **facts: Any) -> None:
        if done:
            raise Killed
        commit(self, block, *rest, **facts)
        done.append(block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "commit", fragile)
        with pytest.raises(Killed):
            pruned(source, tokens, output, STREAM, ranks)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (2, 2)])
def test_another_number_of_processes_goes_on(zoo: Zoo, tokens: Path, tmp_path: Path, before: int, after: int) -> None:
    source, output = zoo("llama"), tmp_path / "out"
    ended = in_processes(before, tmp_path / "said", lambda ranks: killed_after_one_block(source, tokens, output, ranks))
    assert [one.code for one in ended] == [0] * before, ended
    shard = next(output.glob("model-*.safetensors"))
    committed = shard.read_bytes()
    assert not (output / "config.json").exists()
    report = pruned_by(after, source, tokens, output, STREAM)[0]
    assert shard.read_bytes() == committed
    alone = pruned(source, tokens, tmp_path / "alone", STREAM)
    assert differing_zeros(tmp_path / "alone", output) < 1e-4
    assert perplexity(report) == pytest.approx(perplexity(alone), rel=1e-3)


def test_the_same_number_of_processes_goes_on_to_the_same_bytes(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    source = zoo("llama")
    in_processes(2, tmp_path / "said", lambda ranks: killed_after_one_block(source, tokens, tmp_path / "out", ranks))
    pruned_by(2, source, tokens, tmp_path / "out", STREAM)
    pruned_by(2, source, tokens, tmp_path / "whole", STREAM)
    shards = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("out", "whole")
    ]
    assert shards[0] == shards[1]


def test_a_process_that_dies_ends_the_run(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    source, output, commit = zoo("llama"), tmp_path / "out", RunDir.commit

    def dying(self: RunDir, block: str, *rest: Any, **facts: Any) -> None:
        commit(self, block, *rest, **facts)
        if not self.ranks.first:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "commit", dying)
        ended = together(2, partial(_by_command, source, tokens, output), tmp_path / "said")
    assert [one.code for one in ended] == [1, -signal.SIGKILL]
    assert ended[0].err.count("error:") == 1 and "Traceback" not in ended[0].err
    assert "another process of this run has ended" in ended[0].err
    assert not (output / "config.json").exists()
    assert [one.code for one in together(2, partial(_by_command, source, tokens, output), tmp_path / "said")] == [0, 0]
    assert (output / "config.json").exists()


def _by_command(source: Path, tokens: Path, output: Path, *more: str) -> None:
    from obsprune.cli import app

    sys.argv = ["obsprune", "prune", str(source), "--dataset", str(tokens), "--nsamples", "8", "--seqlen", "16",
                "--solver", "sparsegpt", "--eval", "none", "-o", str(output), *more]  # fmt: skip
    app()


def test_only_the_first_process_talks(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    words = partial(_by_command, zoo("llama"), tokens, tmp_path / "out", "--json")
    first, second = together(2, words, tmp_path / "said")
    assert json.loads(first.out)["sparsity"]["reached"] == 0.5
    assert (second.code, second.out, second.err) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nsamples", "1"], "1 samples cannot be shared by 2 processes"),
        (["--set", "data.heldout=1"], "1 samples cannot be shared by 2 processes"),
        (["--sparsity", "0.2", "--solver", "nothing"], "unknown solver"),
        (["--set", "model.blocks=nowhere"], "no module's name matches"),
    ],
)
def test_an_error_is_told_once(zoo: Zoo, tokens: Path, tmp_path: Path, words: list[str], says: str) -> None:
    output = tmp_path / "out"
    first, second = together(2, partial(_by_command, zoo("llama"), tokens, output, *words), tmp_path / "said")
    assert (first.code, second.code) == (2, 2)
    assert says in " ".join(first.err.split()) and "Traceback" not in first.err + second.err
    assert second.err == ""
    assert not output.exists()


def test_every_process_must_see_the_output(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    """With a relative path and other working directories they do not."""

    def apart() -> None:
        own = tmp_path / os.environ["RANK"]
        own.mkdir(exist_ok=True)
        os.chdir(own)
        _by_command(zoo("llama"), tokens, Path("out"))

    first, second = together(2, apart, tmp_path / "said")
    assert (first.code, second.code) == (2, 2)
    assert "process 1 does not see" in first.err and second.err == ""
    assert not list(tmp_path.rglob("*.safetensors"))


def test_tasks_that_not_all_have_are_left_out(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 40)
    make = plan.make_task

    def without(name: str, setting: Any) -> Any:
        if name == "heldout" and os.environ["RANK"] == "1":
            raise InputError("there is none here")
        return make(name, setting)

    asked = recipe(zoo("llama"), tokens, {"evaluation": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "make_task", without)
        work = partial(prune, asked, tmp_path / "out", Silent())
        ended = in_processes(2, tmp_path / "said", lambda ranks: work(ranks=ranks))
    assert [one.code for one in ended] == [0, 0], ended
    assert ended[0].value["evaluation"] == {}
    assert any("heldout is left out: not every process" in notice for notice in ended[0].value["warnings"])


def test_copies_of_the_checkpoint_will_do(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    """Each process has its own, with other times: the run goes on all the same."""
    for rank in range(2):
        shutil.copytree(zoo("llama"), tmp_path / f"model-{rank}")
        os.utime(tmp_path / f"model-{rank}/model.safetensors", (10**9, 10**9 + rank))

    def work(ranks: Ranks) -> None:
        own = tmp_path / f"model-{ranks.rank}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load_module, "locate", lambda *_: own)
            patch.setattr(pipeline, "locate", lambda *_: own)
            killed_after_one_block(zoo("llama"), tokens, tmp_path / "out", ranks)
            with pytest.raises(Killed):  # the same command goes on, and is killed again
                patch.setattr(RunDir, "finish", _killed)
                pruned(zoo("llama"), tokens, tmp_path / "out", STREAM, ranks)

    ended = in_processes(2, tmp_path / "said", work)
    assert [one.code for one in ended] == [0, 0], ended


def _killed(*given: Any) -> None:
    raise Killed


def test_fewer_steps_are_said(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    settings = {"matching": {"passes": 1, "steps": 14}, "evaluation": ["none"]}
    report = pruned_by(2, zoo("llama"), tokens, tmp_path / "out", settings)[0]
    assert any("matching makes 7 optimizer steps a pass in 2 processes and 14 in one" in w for w in report["warnings"])


@pytest.mark.slow
def test_torchrun(zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    torchrun = shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun"
    words = ["prune", zoo("llama"), "--dataset", tokens, "--nsamples", 8, "--seqlen", 16, "--eval", "none", "-o", "out"]
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc_per_node", "2", "-m", "obsprune", *map(str, words)],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out\n"
    pruned_zeros = [float((x == 0).float().mean()) for k, x in tensors(tmp_path / "out").items() if "_proj" in k]
    assert pruned_zeros == pytest.approx([0.5] * len(pruned_zeros), abs=1e-3)


def test_accelerate_on_a_cpu_is_refused(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from obsprune.cli import app

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    done = CliRunner().invoke(app, ["prune", str(zoo("llama")), "--dataset", str(tokens), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and "torchrun" in done.stderr
    assert not (tmp_path / "out").exists()
