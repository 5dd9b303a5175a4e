"""Bad input: one sentence with the way out, exit code 2, nothing touched."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from driver import Cli
from safetensors.torch import load_file, save_file
from zoo import Zoo

SMALL = ("--nsamples", "4", "--eval", "none")


def demo_copy(path: Path) -> Path:
    return Path(shutil.copytree(str(files("obsprune") / "demo"), path))


def refused(cli: Cli, *words: object, says: list[str]) -> None:
    """The command fails with code 2 and one line that holds every phrase; the directory stays as it was."""
    before = sorted(Path.cwd().rglob("*"))
    result = cli(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for phrase in says:
        assert phrase in lines[0]
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sparsity", "1"], ["--sparsity 1 ", "[0, 1)"]),
        (["--sparsity", "-0.1"], ["-0.1", "[0, 1)"]),
        (["--sparsity", "50"], ["[0, 1)", "--sparsity 0.5"]),
        (["--sparsity", "nan"], ["nan", "[0, 1)"]),
        (["--pattern", "2:4", "--sparsity", "0.6"], ["2:4", "0.5", "0.6", "drop one"]),
        (["--pattern", "5:4"], ["5:4", "less than m"]),
        (["--pattern", "blocky"], ["blocky", "unstructured"]),
        (["--pattern", "3:7"], ["model.layers.0.self_attn.q_proj", "3:7", "columns", "--skip"]),
        (["--solver", "sparcegpt"], ["sparcegpt", "did you mean sparsegpt"]),
        (["--eval", "wikitext2=x"], ["wikitext2=x", "did you mean wikitext2"]),
        (["--eval", "none", "--eval", "heldout"], ["none", "drop it"]),
        (["--iters", "0"], ["--iters 0", "from 1"]),
        (["--set", "rounds.tune=maskd"], ["rounds.tune", "did you mean masked"]),
        (["--set", "rounds.steps=0"], ["rounds.steps 0", "from 1"]),
        (["--set", "rounds.damping=-1"], ["rounds.damping", "from 0 up"]),
        (["--iters", "2", "--set", "data.heldout=0"], ["held-out", "--nsamples"]),
        (["--set", "solver.dampin=1"], ["dampin", "did you mean damping"]),
        (["--set", "solver.damping=high"], ["solver.damping", "'high'", "float"]),
        (["--set", "solver.damping"], ["KEY=VALUE"]),
        (["--set", "modell.name=x"], ["modell", "did you mean model"]),
        (["--set", "data=3"], ["data", "mapping"]),
        (["--set", "data=null"], ["data", "mapping"]),
        (["--set", "solver=3"], ["solver", "dict"]),
        (["--set", "solver.damping=.nan"], ["solver.damping", "from 0 up"]),
        (["--set", "skip=abc"], ["skip", "list"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--set", "seed=99999999999999999999"], ["2^63"]),
        (["--skip", "("], ["regular expression"]),
        (["--skip", "."], ["nothing is left to prune"]),
        (["--batch-size", "many"], ["many", "auto"]),
        (["--nsamples", "0"], ["--nsamples 0", "from 1"]),
        (["--dtype", "int8"], ["int8", "float32"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--dataset", "c5"], ["c5", "did you mean c4"]),
        (["--dataset", "missing.txt"], ["missing.txt"]),
        (["--dataset", "."], ["directory"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--nsamples", "100000"], ["100000", "--nsamples"]),
        (["--set", "model.blocks=nothing"], ["model.blocks", "nothing"]),
    ],
)
def test_bad_flags(cli: Cli, words: list[str], says: list[str]) -> None:
    refused(cli, "prune", "demo", *words, says=says)


def test_bad_models(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    refused(cli, "prune", "empty", says=["empty", "config.json"])
    refused(cli, "prune", "file", says=["is a file"])
    refused(cli, "prune", "./missing", says=["there is no directory"])
    refused(cli, "prune", "someone/not-cached", says=["someone/not-cached", "hub"])
    refused(cli, "prune", "meta-llama/Llama-2-7b", says=["meta-llama/Llama-2-7b", "cannot be reached"])
    refused(cli, "prune", says=["no model given"])


def test_bad_datasets(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("Mia put the ball in the box.")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "table.jsonl").write_text(json.dumps({"a": "x", "b": "y"}) + "\n")
    refused(cli, "prune", "demo", "--dataset", "empty.txt", says=["empty"])
    refused(cli, "prune", "demo", "--dataset", "short.txt", says=["0 sequences", "128"])
    refused(cli, "prune", "demo", "--dataset", "binary.txt", says=["UTF-8"])
    refused(cli, "prune", "demo", "--dataset", "table.jsonl", says=["a, b", "--text-column"])
    refused(cli, "prune", "demo", "--dataset", "table.jsonl", "--text-column", "c", says=["'c'"])


def test_truncated_weights(cli: Cli, tmp_path: Path) -> None:
    path = demo_copy(tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(
        cli, "prune", "model", *SMALL, "--dataset", "model/calibration.txt", says=["model.safetensors", "truncated"]
    )


def change_weight(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name][0, 0] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_nan_in_a_weight_names_it(cli: Cli, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    change_weight(demo_copy(tmp_path / "model"), name, torch.nan)
    refused(cli, "prune", "model", *SMALL, "--dataset", "model/calibration.txt", says=[name, "NaN"])


def test_infinite_activations_name_the_matrix(cli: Cli, tmp_path: Path) -> None:
    change_weight(demo_copy(tmp_path / "model"), "model.layers.1.mlp.up_proj.weight", 3e38)
    words = ("prune", "model", *SMALL, "--dataset", "model/calibration.txt")
    refused(cli, *words, says=["activations into model.layers.", "not finite", "--dtype float32"])


def test_output_directory_in_use(cli: Cli, tmp_path: Path, pruned_demo: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    refused(cli, "prune", "demo", *SMALL, "-o", "mine", says=["mine", "not empty"])
    refused(cli, "prune", "demo", *SMALL, "-o", "mine", "--force", says=["mine", "not made by obsprune"])
    refused(cli, "prune", "demo", *SMALL, "-o", pruned_demo, says=["finished run", "--force"])
    refused(cli, "prune", pruned_demo, *SMALL, "-o", pruned_demo, "--force", says=["the dense checkpoint itself"])
    assert (pruned_demo / "report.json").is_file()


def test_bad_eval_and_inspect(cli: Cli, tmp_path: Path) -> None:
    refused(cli, "eval", says=["no result", "obsprune prune demo"])
    refused(cli, "eval", "demo", "--task", "c4=x", says=["c4=x", "known"])
    refused(cli, "eval", "demo", "--task", "text=none.txt", says=["none.txt"])
    refused(cli, "eval", "demo", "--task", "heldout", says=["nothing held out"])
    refused(cli, "inspect", tmp_path, says=["is not a checkpoint: it has no config.json"])
    (tmp_path / "progress.jsonl").touch()
    refused(cli, "inspect", tmp_path, says=["has no report.json", "the run is not finished"])


def test_other_tokenizers_are_not_compared(cli: Cli, tmp_path: Path, zoo: Zoo) -> None:
    words = ("eval", "demo", "--task", f"text={files('obsprune') / 'demo/evaluation.txt'}", "--limit", "1")
    refused(cli, *words, "--compare", zoo("llama"), says=["no usable tokenizer"])


def test_other_tokens_are_not_compared(cli: Cli, tmp_path: Path) -> None:
    """The same text, cut by a tokenizer that begins it otherwise."""
    other = shutil.copytree(files("obsprune") / "demo", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ("eval", "demo", "--task", f"text={files('obsprune') / 'demo/evaluation.txt'}", "--limit", "1")
    refused(cli, *words, "--compare", other, says=["is not the same for demo and", "other tokens"])


def test_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSPRUNE_DEBUG", "1")
    result = cli("prune", "demo", "--sparsity", "2")
    assert result.exit_code == 2
    assert "InputError" in result.stderr and "recipe.py" in result.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("solver: 3", ["solver", "dict"]),
        ("- a", ["no recipe"]),
        ("a: [", ["is not YAML"]),
        ("sparsity: .inf", ["inf"]),
        ("1: 2", ["no key '1'"]),
        ("solver: {name: [1]}", ["unknown solver"]),
        ("data: null", ["data", "mapping"]),
    ],
)
def test_bad_recipes(cli: Cli, tmp_path: Path, text: str, says: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    refused(cli, "prune", "demo", "--config", "recipe.yaml", says=says)


@pytest.mark.parametrize("shape", [(10,), (200, 0), (200, 1)])
def test_token_files_without_rows(cli: Cli, tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file({"input_ids": torch.zeros(shape, dtype=torch.long)}, tmp_path / "t.safetensors")
    refused(cli, "prune", "demo", "--dataset", "t.safetensors", says=["not integer ids [n, seqlen]"])
