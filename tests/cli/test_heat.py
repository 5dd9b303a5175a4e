"""Maps of sparsity and error, and `obsprune inspect --zeros`."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from driver import Cli
from rich.console import Console
from safetensors.torch import load_file, save_file
from screens import COLOUR, same_as_kept

import obsprune
from obsprune.cli.heat import COLOURED, Heat, Scale, heat_maps, shortened
from obsprune.report.grid import make_grid

LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def drawn(maps: list[Heat], **environment: str) -> str:
    """What a terminal is sent; a file where the environment has no TERM."""
    page = io.StringIO()
    console = Console(file=page, force_terminal="TERM" in environment, width=80, _environ=environment)
    for one in maps:
        console.print(one)
    return page.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def matrices(depth: int, kinds: list[str], prefix: str = "model.layers") -> list[dict[str, Any]]:
    """Zeros and errors that grow with the depth, by steps that differ between kinds."""
    return [
        {
            "block": f"{prefix}.{layer}",
            "name": f"{prefix}.{layer}.{kind}",
            "shape": [64, 64 * (1 + number)],
            "sparsity": 0.3 + 0.5 * layer / depth + 0.02 * (number % 7),
            "error": 1e-4 * 10 ** (2 * layer / depth + 0.1 * (number % 7)),
        }
        for layer in range(depth)
        for number, kind in enumerate(kinds)
    ]


MIXED = [f"mlp.experts.{expert}.{name}" for expert in range(40) for name in ("gate_proj", "up_proj", "down_proj")]
MODELS = {
    "shallow": matrices(4, LLAMA),
    "7b": matrices(32, LLAMA),
    "405b": matrices(126, LLAMA),
    "experts": [*matrices(1, LLAMA), *matrices(12, [*LLAMA[:4], *MIXED])[124:]],
    "many-kinds": matrices(10, [f"branch.{number}.a_rather_long_name_of_a_layer_{number}" for number in range(40)]),
}


@pytest.mark.parametrize("model", MODELS)
def test_maps_fit_into_80_columns(model: str) -> None:
    maps = heat_maps(MODELS[model])
    coloured, file = drawn(maps, TERM="xterm-256color"), drawn(maps)
    assert COLOUR.search(coloured) and "\x1b" not in file and file.isascii()
    assert max(map(len, plain(coloured).splitlines())) <= 80 and file.count("\n") == coloured.count("\n") < 60
    same_as_kept(f"heat-{model}", f"{plain(coloured)}\n{file}")


def test_no_colour_and_terminals_without() -> None:
    maps = heat_maps(MODELS["shallow"])
    for environment in ({"TERM": "xterm-256color", "NO_COLOR": "1"}, {"TERM": "dumb"}):
        text = drawn(maps, **environment)
        assert not COLOUR.search(text) and plain(text) == drawn(maps)


def test_experts_are_one_row() -> None:
    rows = re.findall(r"^mlp\.experts\S*", drawn(heat_maps(MODELS["experts"])), re.MULTILINE)
    assert rows == [f"mlp.experts.*.{name}" for name in ("gate_proj", "up_proj", "down_proj")] * 2


def test_what_has_no_error_has_no_map_of_it() -> None:
    counted = [{key: value for key, value in one.items() if key != "error"} for one in MODELS["shallow"]]
    assert [heat.title for heat in heat_maps(counted)] == ["sparsity"]


@pytest.mark.parametrize(("value", "level"), [(0.0, 0), (0.5, 5), (0.999, 9), (1.0, 9)])
def test_where_all_are_the_same_the_mark_is_the_share_itself(value: float, level: int) -> None:
    assert Scale(value, value).level(value, 10) == level


def test_levels() -> None:
    even, factors = Scale(0.2, 0.6), Scale(1e-4, 1e-2, by_factors=True)
    assert [even.level(value, 4) for value in (0.2, 0.29, 0.31, 0.41, 0.55, 0.6)] == [0, 0, 1, 2, 3, 3]
    assert [factors.level(value, 4) for value in (0.0, 1e-4, 4e-4, 2e-3, 9e-3, 1.0)] == [0, 0, 1, 2, 3, 3]
    assert [even.level(value, 4) for value in (math.inf, math.nan)] == [3, 3]
    assert len(COLOURED.marks) == len(COLOURED.colours)


def test_errors_that_are_no_numbers_or_nothing() -> None:
    told = [one | {"error": value} for one, value in zip(MODELS["shallow"], [math.inf, math.nan, 0.0], strict=False)]
    text = drawn([Heat("error", make_grid(told, "error"), by_factors=True)])
    assert "error, depth across" in text


def test_long_names_lose_their_middle() -> None:
    assert shortened("self_attn.q_proj", 16) == "self_attn.q_proj"
    assert shortened("a.very.long.name.of.q_proj", 16) == "a.ver..of.q_proj"


def zeroed(source: Path, target: Path) -> dict[str, float]:
    """A copy of a checkpoint with zeros of its own, and without a report: {matrix: sparsity}."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (target / path.name).write_bytes(path.read_bytes())
    tensors, shares = load_file(source / "model.safetensors"), {}
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        if name.endswith("_proj.weight"):
            count = index * tensor.numel() // (2 * len(tensors))
            tensor.view(-1)[:count] = 0.0
            shares[name.removesuffix(".weight")] = float((tensor == 0).float().mean())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return shares


def test_zeros_of_any_checkpoint(cli: Cli, tmp_path: Path) -> None:
    shares = zeroed(Path(obsprune.__file__).parent / "demo", tmp_path / "sparse")
    found = json.loads(cli("inspect", tmp_path / "sparse", "--zeros", "--json").stdout)
    assert {matrix["name"]: matrix["sparsity"] for matrix in found["matrices"]} == pytest.approx(shares)
    assert found["sparsity"]["zeros"] == sum(matrix["zeros"] for matrix in found["matrices"]) > 0
    shown = cli("inspect", tmp_path / "sparse", "--zeros")
    assert shown.exit_code == 0 and "sparsity, depth across" in shown.stdout and "error, depth" not in shown.stdout


def test_zeros_of_a_result_beside_its_errors(cli: Cli, pruned_demo: Path) -> None:
    counted = json.loads(cli("inspect", pruned_demo, "--zeros", "--json").stdout)["matrices"]
    reported = json.loads(cli("inspect", pruned_demo, "--json").stdout)["matrices"]
    for key in ("name", "zeros", "sparsity", "error", "dtype"):
        assert [matrix[key] for matrix in counted] == [matrix[key] for matrix in reported], key
    for words in ([], ["--zeros"]):
        assert "error, depth across" in cli("inspect", pruned_demo, *words).stdout


def test_a_packed_checkpoint(cli: Cli, pruned_demo: Path) -> None:
    assert cli("pack", pruned_demo, "-o", "packed", "-q").exit_code == 0
    found = json.loads(cli("inspect", "packed", "--zeros", "--json").stdout)
    assert found["sparsity"]["reached"] == pytest.approx(0.5, abs=1e-3)


def test_a_damaged_report_is_refused(cli: Cli, pruned_demo: Path, tmp_path: Path) -> None:
    report = json.loads((pruned_demo / "report.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in pruned_demo.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    report["matrices"][0]["shape"] = [0, 0]
    report["matrices"] = report["matrices"][:1] * 2
    (copy / "report.json").write_text(json.dumps(report))
    refused = cli("inspect", copy)
    assert refused.exit_code == 2 and "is not as obsprune writes it" in refused.stderr


def test_the_hint(cli: Cli) -> None:
    assert "--zeros reads the weights" in cli("inspect", "demo").stdout
