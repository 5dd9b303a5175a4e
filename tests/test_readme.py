"""The README's commands run as they stand, and its file map is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every line of every `bash` block."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_first_two_commands_are_the_scripts() -> None:
    assert commands()[:2] == ["scripts/demo.sh", "scripts/test.sh"]
    assert all((ROOT / script).is_file() for script in commands()[:2])


@pytest.mark.slow
def test_every_other_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from obsprune.cli import app

    monkeypatch.chdir(tmp_path)
    asked = commands()[2:]
    assert len(asked) >= 7
    for command in asked:
        program, *words = shlex.split(command)
        assert program == "obsprune"
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (command, result.stderr)


def test_the_file_map_names_every_module() -> None:
    code = README.partition("## File map")[2]
    modules = {path.name for path in (ROOT / "src/obsprune").rglob("*.py")} - {"__init__.py", "__main__.py"}
    missing = {name for name in modules if name not in code} - {"prune.py", "evaluate.py", "inspect.py"}
    assert not missing
