"""What README and docs/ say is run, and the site is built of them. A block of code is what it is marked as:

bash     obsprune's commands, run as they stand: a page is one story, from top to bottom, in one folder
python   run in that folder, too, with the names that the page's earlier blocks have made
yaml     a recipe; with a title it lies in the folder under that name
sh       not run, for one of REASONS; each command is held against the command line, and made a recipe and a plan
text     no code
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner
from zoo import Zoo

import obsprune
from obsprune import presets
from obsprune.cli import app
from obsprune.recipe import make_recipe
from obsprune.trees import read_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(obsprune|python|pip|torchrun|accelerate|[A-Z_]+=\S+) |scripts/\w")

REASONS = {
    r"meta-llama/|facebook/": "weights of gigabytes, from the hub",
    r"my-|stories\.txt|PATH|TRAIN|DENSE|\bOUT\b|\bDIR\b|\bout\b": "files of the reader's own",
    r"--push-to-hub|obsprune push": "an account on the hub",
    r"^torchrun |^accelerate launch ": "several processes",
    r"--device cuda": "a GPU",
    r"^pip install |^(python )?scripts/": "makes an environment, or measures for hours",
}
"""What a command is like that no test runs, and why."""


@dataclass(frozen=True)
class Block:
    """One block of code of a page."""

    kind: str
    title: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its lines, joined where one goes on, without remarks."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.split(r"(?:^|\s\s+)# ", line)[0].strip())]


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Block(*match) for match in FENCE.findall(text)]
    assert len(found) == len(re.findall("^ *```", text, flags=re.MULTILINE)) / 2, f"{page}: a fence that nothing reads"
    return found


def words_of(command: str) -> list[str]:
    """What obsprune is given in a command: `HF_HUB_OFFLINE=1 obsprune …`, `torchrun … -m obsprune …`."""
    words = shlex.split(command)
    return words[words.index("obsprune") + 1 :]


def having(kind: str) -> list[str]:
    return [page for page in PAGES if any(block.kind == kind for block in blocks(page))]


# ---------------------------------------------------------------------------------------------------- what is run


def run_commands(block: Block, names: dict[str, Any]) -> None:
    for command in block.commands:
        program, *words = shlex.split(command)
        assert program == "obsprune", f"{command}: only obsprune runs in `bash`; others belong into `sh`"
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (command, result.output, result.exception)


def run_python(block: Block, names: dict[str, Any]) -> None:
    exec(compile(block.text, "a block of python", "exec"), names)


def keep_file(block: Block, names: dict[str, Any]) -> None:
    if block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")


RUN: dict[str, Callable[[Block, dict[str, Any]], None]] = {
    "bash": run_commands,
    "python": run_python,
    "yaml": keep_file,
    "sh": lambda block, names: None,
    "text": lambda block, names: None,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page in having("bash") + having("python")])
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        RUN[block.kind](block, names)


# ------------------------------------------------------------------------------------------------ what is not run


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_kind(page: str) -> None:
    for block in blocks(page):
        assert block.kind in RUN, f"{page}: `{block.kind}`; one of {', '.join(RUN)} is expected"
        hidden = [line for line in block.text.splitlines() if COMMAND.match(line)]
        assert block.kind != "text" or not hidden, f"{page}: {hidden} in `text` is a command"


@pytest.mark.parametrize("page", having("yaml"))
def test_yaml_is_a_recipe(page: str, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.kind == "yaml":
            (tmp_path / "recipe.yaml").write_text(block.text, encoding="utf-8")
            make_recipe(read_recipe(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("page", having("sh"))
def test_a_command_that_is_not_run_has_a_reason_and_exists(page: str) -> None:
    for command in [command for block in blocks(page) if block.kind == "sh" for command in block.commands]:
        assert any(re.search(pattern, command) for pattern in REASONS), f"{page}: {command}: run it, in `bash`"
        if "obsprune" in shlex.split(command):
            parse(words_of(command))
        else:
            exists(command)


def parse(words: list[str]) -> None:
    """Commands, options and the types of their values; raises typer's UsageError."""
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    command.make_context("obsprune", list(words))


def exists(command: str) -> None:
    words = [word for word in shlex.split(command) if word != "python"]
    if words[0] != "pip":
        assert (ROOT / words[0]).is_file(), command
        return
    assert words[1] == "install", command
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"\[(.+?)\]", command):
        assert set(extra.split(",")) <= set(known), command


@pytest.fixture
def stand_ins(zoo: Zoo, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A word of a command -> one that is here: a tiny model, a text, some pictures."""
    monkeypatch.chdir(tmp_path)
    text = Path(obsprune.__file__).parent / "demo/calibration.txt"
    for name in ("my-text.txt", "my-other-text.txt", "TRAIN.txt", "OTHERS.txt"):
        Path(name).write_bytes(text.read_bytes())
    Path("my-text.jsonl").write_text('{"text": "Once upon a time."}\n' * 2000)
    vit = str(zoo("vit"))
    models = {"./my-model": "demo", "DENSE": "demo", "facebook/deit-tiny-patch16-224": vit}

    def stand_in(word: str) -> str:
        word = "demo" if word.startswith("meta-llama/") else models.get(word, word)
        return f"imagenet={pictures}" if word.startswith("imagenet=") else word

    return stand_in


@pytest.mark.slow
@pytest.mark.parametrize("page", having("sh"))
def test_a_run_that_is_not_run_can_be_planned(page: str, stand_ins: Callable[[str], str]) -> None:
    """On a stand-in, with few samples."""
    for command in [command for block in blocks(page) if block.kind == "sh" for command in block.commands]:
        if "obsprune" in (given := shlex.split(command)) and {"prune", "train-prune"} & set(given):
            words = [stand_ins(word) for word in words_of(command)]
            least = ["--dry-run", "--nsamples", "4", "--json", "--set", "data.heldout=4"]
            result = CliRunner().invoke(app, [*words, *least])
            assert result.exit_code == 0, (command, result.output)


# ------------------------------------------------------------------------------------------------- what is listed


def test_the_recipe_that_is_written_out_has_every_default() -> None:
    (block,) = (block for block in blocks("docs/recipes.md") if block.title == "defaults.yaml")
    assert yaml.safe_load(block.text) == make_recipe().tree()


def test_every_preset_and_public_name_is_on_its_page() -> None:
    page = (ROOT / "docs/presets.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in presets.names())
    api = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    missing = {name for name in obsprune.PUBLIC if not re.search(rf"`{name}\b", api)}
    assert not missing


# ------------------------------------------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages built, every warning an error: links to pages, headings and files of the repository among them."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (pip install 'obsprune[docs]')")
    out = tmp_path_factory.mktemp("site")
    # not --quiet: it counts no warnings
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert built.returncode == 0, built.stderr
    return out


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.glob("*.html"))
    assert {f"docs/{page.stem}.md" for page in pages} - {"docs/404.md"} == set(PAGES) - {"README.md"}
    loaded = r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>"
    assert [found for page in pages for found in re.findall(loaded, page.read_text(encoding="utf-8"))] == []


def test_lists_and_tables_are_lists_and_tables(site: Path) -> None:
    """Python-Markdown wants an empty line before them, where GitHub does not."""
    for page in sorted(site.glob("*.html")):
        paragraphs = re.findall(r"<p>(.*?)</p>", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert [text for text in paragraphs if re.search(r"^(?:[-*] |\d+\. |\|)", text, flags=re.MULTILINE)] == []
