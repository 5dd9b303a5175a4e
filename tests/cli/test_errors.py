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

from obsprune.errors import first_line, printable, redacted

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
    refused(cli, "prune", pruned_demo, *SMALL, "-o", pruned_demo, "--force", says=["which is read"])
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


SECRET = "hf_" + "Ab3" * 8


@pytest.mark.parametrize(
    "text",
    [
        f"401 for {SECRET}",
        f"https://{SECRET}@huggingface.co/x",
        "https://user:Ab3Ab3@host/x.txt is not there",
        "https://user:p:Ab3Ab3@host/x",
        "Ab3user:Ab3Ab3@host",
        "https://host/x?token=Ab3Ab3&y=1",
        "https://host/x?y=1&X-Amz-Signature=Ab3Ab3&X-Amz-Credential=Ab3%2F1",
        "https://host/x?sig=Ab3Ab3 (403)",
        "https://host/x?Policy=Ab3&Key-Pair-Id=Ab3&y=1",
        "https://host/x?access_token=Ab3Ab3#key=Ab3",
        "Illegal header value b'Bearer Ab3Ab3Ab3Ab3'",
        "{'Authorization': 'Basic Ab3Ab3Ab3=='}",
        "headers: authorization: Bearer Ab3Ab3Ab3Ab3",
        "of the environment: Ab3Ab3-of-the-environment",
    ],
)
def test_secrets_are_redacted(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "Ab3Ab3-of-the-environment")
    assert "Ab3" not in redacted(text) and "***" in redacted(text)
    assert "Ab3" not in first_line(RuntimeError(f"{text}\nmore"))


@pytest.mark.parametrize(
    "text",
    [
        "give --token or set HF_TOKEN",
        "a private one needs --token",
        "model.layers.0.self_attn.key: [3, 4]",
        "https://huggingface.co/docs/hub?page=2&sort=likes#usage",
        "solver.damping=0.02; tokens 3",
        "/tmp/a@b:c/d key=value",
        "did you mean text=FILE or mmlu=PATH",
        "bearer of news",
    ],
)
def test_all_else_stays(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "m")  # too short to be one
    assert redacted(text) == text


def test_what_a_terminal_would_obey_is_spelt_out() -> None:
    assert printable("a\x1b[31mb\nc\r\u202ed\ud800e\x9b\x00") == r"a\x1b[31mb\nc\r\u202ed\ud800e\x9b\x00"
    assert printable("plain, 中文 é × 🙂 [bold]") == "plain, 中文 é × 🙂 [bold]"


def test_a_reason_on_the_second_line_is_told() -> None:
    assert first_line(ValueError("Validation error for 'x':\n    expected int\nmore")) == (
        "Validation error for 'x': expected int"
    )
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"


def test_secrets_of_the_command_line_are_not_told(cli: Cli) -> None:
    for words in (
        ("--dataset", f"https://me:{SECRET}@host/text.txt"),
        ("--dataset", "https://host/text.txt?token=Ab3Ab3"),
        ("--eval", "text=https://host/text.txt?sig=Ab3Ab3"),
        ("--set", f"seed={SECRET}"),
        ("--config", f"{SECRET}.yaml"),
    ):
        assert "Ab3" not in cli("prune", "demo", *words).output
    for model in (f"https://me:{SECRET}@host/model", f"someone/{SECRET}", "me:Ab3Ab3@host"):
        assert "Ab3" not in cli("prune", model, "--token", SECRET).output
        assert "Ab3" not in cli("inspect", model, f"--token={SECRET}").output


def test_secrets_do_not_reach_a_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSPRUNE_DEBUG", "1")
    result = cli("prune", "demo", "--dataset", f"https://me:{SECRET}@host/text.txt")
    assert "Traceback" in result.stderr and "Ab3" not in result.output


@pytest.mark.parametrize("words", [("--token", SECRET), (f"--token={SECRET}",)])
def test_secrets_do_not_reach_a_result(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    asked = ("prune", "demo", *SMALL, "--seqlen", "8", "--solver", "magnitude", "-o", "out", *words)
    monkeypatch.setattr("sys.argv", ["obsprune", *asked])
    result = cli(*asked)
    assert result.exit_code == 0 and "Ab3" not in result.output
    made = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".jsonl", ".yaml")]
    assert len(made) > 5 and not [path.name for path in made if "Ab3" in path.read_text()]


def test_names_of_a_checkpoint_do_not_steer_the_terminal(cli: Cli, tmp_path: Path) -> None:
    model = demo_copy(tmp_path / "model")
    stored = load_file(model / "model.safetensors") | {"\x1b]0;owned\x07\x1b[2J": torch.ones(2, 2)}
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    result = cli("inspect", "model")
    assert result.exit_code == 0 and r"\x1b]0;owned\x07" in result.output
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["\x1b[2J\n\u202e"]}))
    refused(cli, "inspect", "model", says=[r"\x1b[2J\n\u202e"])


def test_long_values_are_told_in_part(cli: Cli) -> None:
    assert len(cli("prune", "demo", "--set", f"seed={'x' * 100_000}").stderr) < 2000


def test_names_that_no_file_can_have(cli: Cli) -> None:
    name = "x" * 5000
    for words in (("prune", name), ("prune", f"./{name}"), ("inspect", name), ("prune", "demo", "--config", name)):
        refused(cli, *words, says=["xxx"])
    for data in (name, f"{name}.txt", f"imagenet={name}", f"{name}.safetensors:x"):
        refused(cli, "prune", "demo", "--dataset", data, says=[""])
