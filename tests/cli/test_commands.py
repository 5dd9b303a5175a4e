"""What the commands print, write and answer."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from driver import Cli

from obsprune.solvers import options

SMALL = ("--nsamples", "8", "--eval", "heldout")
FLAGS = ("--solver", "sparsegpt", "--sparsity", "0.7", "--eval", "none", "--nsamples", "16", "--json", "--force")


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from obsprune.cli import app\n"
        "assert CliRunner().invoke(app, ['prune', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("words", "default"),
    [
        (["prune"], "default: 0.5, or what n:m implies"),
        (["train-prune"], "default: sparsegpt"),
        (["eval"], "default: 5 for mmlu"),
        (["recipe", "run"], "default: the recipe's"),
    ],
)
def test_help_tells_defaults(cli: Cli, words: list[str], default: str) -> None:
    shown = cli(*words, "--help").stdout.replace("│", " ")  # rich takes square brackets for markup
    assert default in " ".join(shown.split())


def test_help_answers_in_half_a_second() -> None:
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "obsprune", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.5  # processor time: the wall clock also times our neighbours


def test_prune_prints_only_the_path_on_stdout(cli: Cli, tmp_path: Path) -> None:
    result = cli("prune", "demo", "--sparsity", "0.5", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "obsprune-out/demo-admm-stream-50\n"
    for phrase in ("[4/4] model.layers.3", "heldout", "dense", "pruned", "reached 0.5000", "peak memory"):
        assert phrase in result.stderr
    newest = cli("eval")
    assert "obsprune-out/demo-admm-stream-50" in newest.stderr
    report = json.loads((tmp_path / "obsprune-out/demo-admm-stream-50/report.json").read_text())
    assert f"{report['evaluation']['heldout']['pruned']['perplexity']:.4f}" in newest.stdout


def test_json_is_all_there_is(cli: Cli) -> None:
    result = cli("prune", "demo", "--pattern", "2:4", "--json", *SMALL)
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert report["sparsity"] == {"asked": 0.5, "pattern": "2:4", "reached": 0.5} | {
        key: report["sparsity"][key] for key in ("zeros", "weights")
    }
    assert report["output"].endswith("demo-admm-stream-2of4")
    assert json.loads(Path(report["output"], "report.json").read_text()) == report


def test_quiet(cli: Cli) -> None:
    result = cli("prune", "demo", "-q", "--eval", "none", "--nsamples", "4")
    assert (result.stderr, result.stdout) == ("", "obsprune-out/demo-admm-stream-50\n")


def test_left_out_evaluation_is_said(cli: Cli) -> None:
    result = cli("prune", "demo", "--nsamples", "4")
    assert result.exit_code == 0
    assert result.stderr.count("wikitext2 is left out") == 1  # at once: it is in the report, too
    report = json.loads(Path(result.stdout.strip(), "report.json").read_text())
    assert any("wikitext2 is left out" in note for note in report["warnings"])


def test_dry_run_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    result = cli("prune", "demo", "--dry-run", "--skip", "down_proj")
    assert result.exit_code == 0 and list(tmp_path.iterdir()) == []
    for phrase in ("model.layers.*.mlp.up_proj", "matches --skip down_proj", "output head", "embedding", "tokens"):
        assert phrase in result.stderr
    plan = json.loads(cli("prune", "demo", "--dry-run", "--json").stdout)
    assert len(plan["matrices"]) == 28 and plan["data"]["sequences"] == 128


def test_underscores_are_dashes(cli: Cli) -> None:
    result = cli("prune", "demo", "--dry_run", "--batch_size", "2", "--text_column", "text", "--json")
    assert json.loads(result.stdout)["recipe"]["engine"]["batch_size"] == 2


def test_config_file_and_flags_that_override_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("sparsity: 0.7\nseed: 3\nsolver: {name: sparsegpt, damping: 0.02}\n")
    words = ("prune", "demo", "--config", "recipe.yaml", "--sparsity", "0.6", "--set", "solver.refit=5", "--dry-run")
    recipe = json.loads(cli(*words, "--json").stdout)["recipe"]
    assert (recipe["sparsity"], recipe["seed"]) == (0.6, 3)
    assert recipe["solver"] == options("sparsegpt") | {"name": "sparsegpt", "damping": 0.02, "refit": 5}


def test_a_recorded_recipe_repeats_the_run(cli: Cli, pruned_demo: Path, tmp_path: Path) -> None:
    result = cli("prune", "--config", pruned_demo / "recipe.yaml", "-o", "again")
    assert result.exit_code == 0, result.stderr
    for shard in pruned_demo.glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_wanda_works_per_row(cli: Cli) -> None:
    recipe = json.loads(cli("prune", "demo", "--solver", "wanda", "--dry-run", "--json").stdout)["recipe"]
    assert recipe["pattern"] == "row"


def test_refit_and_true_sequential_lower_the_error(cli: Cli) -> None:
    def errors(*words: str) -> dict[str, float]:
        result = cli("prune", "demo", *FLAGS, *words)
        return {matrix["name"]: matrix["error"] for matrix in json.loads(result.stdout)["matrices"]}

    plain, refitted = errors(), errors("--set", "solver.refit=10")
    first = [name for name in plain if name.startswith("model.layers.0.")]  # later blocks see other inputs
    assert all(refitted[name] < plain[name] for name in first)
    sequential = errors("--set", "engine.true_sequential=true")
    assert sequential["model.layers.0.self_attn.q_proj"] == plain["model.layers.0.self_attn.q_proj"]
    assert sequential["model.layers.0.mlp.down_proj"] != plain["model.layers.0.mlp.down_proj"]


def test_eval_compares(cli: Cli, pruned_demo: Path) -> None:
    result = cli("eval", pruned_demo, "--compare", "demo", "--limit", "2", "--json")
    entry = json.loads(result.stdout)["tasks"]["heldout"]
    assert entry["ratio"] == entry["model"]["perplexity"] / entry["compare"]["perplexity"] > 1
    for field in ("corpus", "join", "seqlen", "stride", "tokens", "sequences", "sha256"):
        assert entry["model"][field] == entry["compare"][field]
    assert entry["model"]["sequences"] == 2


def test_inspect_reads_no_weights(cli: Cli, pruned_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsprune.models.files.Safetensors.read", None)
    result = cli("inspect", pruned_demo)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("0.5000") >= 28 and "float32" in result.stdout
    assert len(json.loads(cli("inspect", pruned_demo, "--json").stdout)["matrices"]) == 28


def test_a_token_reaches_neither_report_nor_log(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["prune", "demo", "--nsamples", "4", "--eval", "none", "--token", "hf_secret", "-q"]
    monkeypatch.setattr(sys, "argv", ["obsprune", *words])
    result = cli(*words)
    output = Path(result.stdout.strip())
    assert "--token" in (output / "report.json").read_text()
    texts = [path.read_text() for path in output.iterdir() if path.suffix != ".safetensors"]
    assert len(texts) >= 5 and not any("hf_secret" in text for text in texts)
    assert "hf_secret" not in result.stderr


def run(*words: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "obsprune", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_a_full_disk_leaves_nothing_that_loads(tmp_path: Path) -> None:
    """Files may not grow beyond 100 kB: the first block's shard does not fit."""

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    words = ("prune", "demo", "--nsamples", "4", "--eval", "none", "-o", "out")
    full = run(*words, cwd=tmp_path, preexec_fn=small_disk)
    assert full.returncode == 2, full.stderr
    assert "error: cannot write" in full.stderr and "Traceback" not in full.stderr
    assert not list(tmp_path.rglob("config.json")) and not list(tmp_path.rglob("*.partial"))
    again = run(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_rounds_are_shown(cli: Cli) -> None:
    result = cli("prune", "demo", "--iters", "2", "--set", "rounds.steps=4", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "obsprune-out/demo-admm-stream-50-iters2\n"
    lines = result.stderr.splitlines()
    for number in (1, 2):
        assert sum(line.startswith(f"round {number} of 2: held-out KL ") for line in lines) == 1
    for phrase in ("rounds, on what was held out", "of the mask moved", "16 different ones in all rounds", "2 *"):
        assert phrase in result.stderr
    report = json.loads(Path("obsprune-out/demo-admm-stream-50-iters2/report.json").read_text())
    assert [entry["best"] for entry in report["rounds"]] == [False, True]
