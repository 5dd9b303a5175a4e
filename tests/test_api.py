"""The Python API: what `import obsprune` offers, on models in files and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import obsprune
from obsprune.models.load import DEMO, locate

FEW = {"data": {"nsamples": 4, "heldout": 2, "seqlen": 64}, "evaluation": ["none"]}
TEXT = {"data": {"dataset": str(locate(DEMO) / "calibration.txt")}}


TOKENIZER = AutoTokenizer.from_pretrained(locate(DEMO))


def whole() -> Any:
    return AutoModelForCausalLM.from_pretrained(locate(DEMO))


@dataclass(frozen=True)
class Largest(obsprune.Solver[obsprune.State]):
    """Keeps what is largest after a power, as somebody outside the package would write it."""

    power: float = 1.0

    def prepare(self, gram: obsprune.Gram) -> obsprune.State:
        return obsprune.State(gram, damping=0.0)

    def search(self, W_RC: Tensor, state: obsprune.State, pattern: obsprune.Pattern) -> tuple[Tensor, Tensor]:
        return W_RC, pattern.keep(W_RC.abs() ** self.power)


def weights(directory: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory).state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_public_name_is_there_has_a_docstring_and_a_type() -> None:
    stub = Path(obsprune.__file__).with_suffix(".pyi").read_text()
    for name, module in obsprune.PUBLIC.items():
        assert getattr(obsprune, name).__doc__, name
        assert name in dir(obsprune)
        assert f"from {module} import {name} as {name}\n" in stub
    assert stub.count(" import ") == len(obsprune.PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = obsprune.prun


def test_the_import_alone_loads_nothing_heavy() -> None:
    code = "import sys, obsprune; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_checkpoint_becomes_what_the_command_line_makes_of_it(tmp_path: Path) -> None:
    result = obsprune.prune("demo", ["fast", FEW, {"sparsity": 0.6}], output=tmp_path / "api")
    asked = ["--preset", "fast", "--sparsity", "0.6", "--nsamples", "4", "--seqlen", "64", "--eval", "none"]
    words = ["-m", "obsprune", "prune", "demo", *asked, "--set", "data.heldout=2", "-o", str(tmp_path / "cli"), "-q"]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    assert result.path == tmp_path / "api"
    assert result.model is None
    assert repr(result) == f"Result(path={result.path!r})"
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)
    assert result.report == json.loads((tmp_path / "api" / "report.json").read_text())
    assert result.report["recipe"] == json.loads((tmp_path / "cli" / "report.json").read_text())["recipe"]
    assert equal(weights(tmp_path / "api"), weights(tmp_path / "cli"))


def test_a_model_in_memory_is_pruned_in_place_to_what_its_directory_becomes(tmp_path: Path) -> None:
    demo = locate(DEMO)
    model = whole()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    recipe = [{"solver": {"name": "sparsegpt"}}, FEW, TEXT, {"pattern": "2:4", "evaluation": ["heldout"]}]
    result = obsprune.prune(model, recipe, processor=TOKENIZER)
    obsprune.prune(str(demo), recipe, output=tmp_path / "same")
    assert result.model is model
    assert result.path is None
    assert set(result.scores["heldout"]) >= {"dense", "pruned", "paired"}
    assert equal(dict(model.state_dict()), weights(tmp_path / "same"))
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert not Path(result.report["output"]).exists()  # nothing is left of it


def test_a_classifier_whose_names_differ_on_disk_is_pruned_in_place(assets: Path) -> None:
    source = assets / "deit-tiny"
    model = AutoModelForImageClassification.from_pretrained(source)
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    data = {"dataset": f"imagenet={assets / 'imagenet-sample'}", "nsamples": 4, "heldout": 2}
    result = obsprune.prune(model, ["fast", {"data": data, "evaluation": ["none"]}], processor=processor)
    pruned = {name for name, p in model.named_parameters() if (p == 0).sum() > (before[name] == 0).sum()}
    assert len(pruned) == len(result.report["matrices"]) == 72
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "embeddings" in name)


def test_an_own_solver_is_used_and_told(tmp_path: Path) -> None:
    plain = obsprune.prune("demo", [FEW, {"solver": {"name": "magnitude"}}], output=tmp_path / "plain")
    own = obsprune.prune("demo", FEW, output=tmp_path / "own", solver=Largest(power=2.0))
    assert own.report["recipe"]["solver"] == {
        "name": f"{__name__}.Largest", "power": 2.0, "refit": 0, "exact": False, "compensate": False
    }  # fmt: skip
    assert equal(weights(tmp_path / "own"), weights(tmp_path / "plain"))  # a power changes no order
    assert own.sparsity == plain.sparsity


def test_an_unfinished_run_of_an_own_solver_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from obsprune import pipeline

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "evaluate_result", stopped)
        with pytest.raises(KeyboardInterrupt):
            obsprune.prune("demo", FEW, output=tmp_path / "out", solver=Largest())
    with pytest.raises(obsprune.InputError, match=r"solver\.power: 1\.0 -> 3\.0"):
        obsprune.prune("demo", FEW, output=tmp_path / "out", solver=Largest(power=3.0))
    assert obsprune.prune("demo", FEW, output=tmp_path / "out", solver=Largest()).path == tmp_path / "out"


def test_several_processes_share_the_work_on_a_checkpoint_and_refuse_a_model_in_memory(tmp_path: Path) -> None:
    def work() -> tuple[float, str]:
        shared = obsprune.prune("demo", [FEW, {"solver": {"name": "wanda"}}], output=tmp_path / "out")
        with pytest.raises(obsprune.InputError) as refused:
            obsprune.prune(object(), FEW)
        return shared.sparsity, str(refused.value)

    ended = together(2, work, tmp_path / "told")
    assert [end.code for end in ended] == [0, 0], ended
    assert ended[0].value == ended[1].value
    assert "in one process, and 2 were started" in ended[0].value[1]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "out" / "progress.jsonl").read_text().splitlines()]
    assert kinds.count("start") == kinds.count("end") == 1 and kinds.count("block") == 4


def test_recipes_are_made_of_layers(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("sparsity: 0.7\nseed: 3\n")
    made = obsprune.make_recipe("balanced", tmp_path / "own.yaml", {"seed": 4})
    assert (made.sparsity, made.seed, made.solver["name"]) == (0.7, 4, "admm")
    assert obsprune.make_recipe(made) == made
    assert obsprune.make_recipe() == obsprune.make_recipe("balanced")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda _: obsprune.prune("demo"), "where the sparse demo goes"),
        (lambda out: obsprune.prune("demo", "fst", output=out), "unknown preset 'fst'; did you mean fast"),
        (lambda out: obsprune.prune("demo", {"sparsty": 0.5}, output=out), "no key 'sparsty'; did you mean sparsity"),
        (lambda out: obsprune.prune("demo", [7], output=out), "7 is no recipe"),
        (lambda out: obsprune.prune("demo", 0.5, output=out), r"0\.5 is no recipe"),
        (lambda out: obsprune.prune("demo", output=out, solver="wanda"), "'wanda' is no solver"),
        (lambda out: obsprune.prune(torch.nn.Linear(2, 2), output=out), "the model is a Linear"),
        (lambda _: obsprune.prune(whole()), "the processor of a model in memory is None"),
        (lambda out: obsprune.prune("demo", output=out, solver=Largest), "is no solver; an object"),
        (lambda _: obsprune.prune(torch.compile(whole()), processor=TOKENIZER), "_orig_mod|is saved and is no weight"),
        (lambda _: obsprune.prune(whole().to("meta"), processor=TOKENIZER), "others of the model are not in memory"),
        (lambda out: obsprune.prune("demo", output=out, solver=Largest(torch.ones(1))), r"power of solver .*Largest"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error_with_the_way_out(call: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(obsprune.InputError, match=told):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()
