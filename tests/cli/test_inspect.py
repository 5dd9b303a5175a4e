"""`obsprune inspect` of checkpoints that are no result: what prune says, without reading a weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Cli
from safetensors.torch import save_file
from shapes import LLAMA2, made, twin, write_meta
from zoo import ZOO, Zoo, tensors

from obsprune.models.files import PICKLED
from obsprune.models.load import load


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that folds no name."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a tensor fails."""
    monkeypatch.setattr("obsprune.models.files.Safetensors.read", None)
    monkeypatch.setattr("obsprune.models.files.Pickled.read", None)


def inspected(cli: Cli, source: Path, *words: str) -> dict[str, Any]:
    shown = cli("inspect", source, *words)
    assert shown.exit_code == 0, shown.stderr
    found: dict[str, Any] = json.loads(cli("inspect", source, *words, "--json").stdout)
    for matrix in found["matrices"]:
        assert matrix["name"] in shown.stdout
    for weight in found["skipped"]:
        assert weight["name"] in shown.stdout and weight["why"] in shown.stdout
    assert f"{found['prunable']:,} weights in {len(found['matrices'])} matrices" in shown.stdout
    return found


@pytest.mark.parametrize("family", [*ZOO, "resnet-basic", "swin"])
def test_it_says_what_prune_would_do(cli: Cli, zoo: Zoo, request: pytest.FixtureRequest, family: str) -> None:
    source = zoo(family)
    model, headers = load(str(source)), tensors(source)
    request.getfixturevalue("blind")
    found = inspected(cli, source)
    assert [(m["name"], tuple(m["shape"])) for m in found["matrices"]] == [(m.name, m.shape) for m in model.matrices]
    assert {weight["name"]: weight["why"] for weight in found["skipped"]} == model.skipped
    assert found["prunable"] == sum(rows * columns for rows, columns in (m.shape for m in model.matrices))
    assert found["parameters"] == sum(tensor.numel() for tensor in headers.values())
    assert found["bytes"] == sum(tensor.numel() * tensor.itemsize for tensor in headers.values())
    assert found["dtypes"]["float32"] == sum(t.numel() for t in headers.values() if t.dtype == torch.float32)
    assert {matrix["dtype"] for matrix in found["matrices"]} == {"float32"}
    assert found["unknown"] == [] and found["files"] == ["model.safetensors"]
    for weight in found["skipped"]:
        tied = weight["name"].endswith("lm_head") and family in ZOO and ZOO[family].tied
        assert (weight["dtype"] is None) is tied, weight


def test_skipped_matrices_and_unknown_tensors(cli: Cli, zoo: Zoo, tmp_path: Path, blind: None) -> None:
    zoo.make("llama-half", ZOO["llama"], torch.float16)
    source = zoo.make("llama-half", ZOO["llama"], torch.float16)
    found = inspected(cli, source, "--skip", "down_proj$")
    whys = {weight["name"]: weight["why"] for weight in found["skipped"]}
    assert whys["model.layers.0.mlp.down_proj"] == "matches --skip down_proj$" and len(found["matrices"]) == 18
    assert {entry["dtype"] for entry in [*found["matrices"], *found["skipped"]]} == {"float16"}
    (tmp_path / "more").mkdir()
    for path in source.iterdir():
        (tmp_path / "more" / path.name).write_bytes(path.read_bytes())
    save_file({"forgotten.bias": torch.ones(3)}, tmp_path / "more/model-2.safetensors")
    weight_map = {"forgotten.bias": "model-2.safetensors"}
    weight_map |= dict.fromkeys(load_keys(source), "model.safetensors")
    (tmp_path / "more/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = inspected(cli, tmp_path / "more")
    assert found["unknown"] == ["forgotten.bias"] and found["dtypes"]["float32"] == 3
    assert found["files"] == ["model-2.safetensors", "model.safetensors"]


def load_keys(source: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_the_other_shapes_of_checkpoints(cli: Cli, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    meta = write_meta(tmp_path / "meta", LLAMA2, twin(dtype=torch.bfloat16), parts=2)
    vision = made("llava", tmp_path / "llava")
    plain = tmp_path / "bin"
    model = twin()
    model.config.save_pretrained(plain)
    torch.save(model.state_dict(), plain / PICKLED.single)
    request.getfixturevalue("blind")
    found = inspected(cli, meta)
    assert found["model"] == str(meta) and found["type"] == "llama" and set(found["dtypes"]) == {"bfloat16"}
    assert found["files"] == ["params.json", "consolidated.00.pth", "consolidated.01.pth"]
    assert inspected(cli, plain)["matrices"] == [entry | {"dtype": "float32"} for entry in found["matrices"]]
    found = inspected(cli, vision)
    assert found["kind"] == "vision-language model" and found["architecture"] == "LlavaForConditionalGeneration"
    assert {weight["why"] for weight in found["skipped"]} == {"embedding", "output head", "outside the language part"}


def test_the_demo(cli: Cli, blind: None) -> None:
    assert len(inspected(cli, Path("demo"))["matrices"]) == 28


def test_errors_that_are_no_numbers_are_dashes(cli: Cli, pruned_demo: Path, tmp_path: Path) -> None:
    """The report of a result has null for them."""
    shutil.copytree(pruned_demo, tmp_path / "result")
    path = tmp_path / "result/report.json"
    report = json.loads(path.read_text())
    for matrix in report["matrices"]:
        matrix["error"] = None
    path.write_text(json.dumps(report))
    for words in ([], ["--zeros"]):
        shown = cli("inspect", tmp_path / "result", *words)
        assert shown.exit_code == 0, shown.stderr
        (line,) = (line for line in shown.stdout.splitlines() if report["matrices"][0]["name"] in line)
        assert "-" in line.split() and "error, depth" not in shown.stdout
