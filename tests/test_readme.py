"""The README begins with the scripts, and its file map is true. Its blocks of code: tests/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILE_MAP = README.partition("## File map")[2]


def test_the_first_commands_are_scripts_that_are_there() -> None:
    first = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)[0].splitlines()
    scripts = [line.split()[0] for line in first]
    assert scripts[:2] == ["scripts/demo.sh", "scripts/test.sh"]
    assert all((ROOT / script).stat().st_mode & 0o111 for script in scripts)


def test_the_file_map_names_every_module_script_and_page() -> None:
    modules = {path.name for path in (ROOT / "src/obsprune").rglob("*.py")} - {"__init__.py", "__main__.py"}
    one_a_command = {"prune.py", "evaluate.py", "inspect.py"}
    beside = {path.name for folder in ("scripts", "docs") for path in (ROOT / folder).iterdir() if path.is_file()}
    assert not {name for name in (modules - one_a_command) | beside if name not in FILE_MAP}


def test_pages_that_the_readme_links_to_are_there() -> None:
    """And their headings: GitHub's rule for the names of those that occur."""
    for page, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", README):
        text = (ROOT / page).read_text(encoding="utf-8")
        headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines()]
        assert not heading or heading in headings, (page, heading)
