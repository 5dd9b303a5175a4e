"""What a release is held to, and that the workflows call scripts that are there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

import obsprune

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import check_release  # noqa: E402  # a script, beside the package

PACKAGE, CHANGELOG = (
    '__version__ = "1.2.3"\n',
    "# Changelog\n\n## 1.2.3 (2027-01-31)\n\n- New.\n\n## 1.2.2 (2026-12-01)\n",
)


def test_the_tag_the_version_and_the_changelog_agree() -> None:
    assert check_release.flaws("v1.2.3", PACKAGE, CHANGELOG) == []


@pytest.mark.parametrize(
    ("tag", "changelog", "said"),
    [
        ("v1.2.4", CHANGELOG, "the tag is v1.2.4, and __version__ is 1.2.3"),
        ("1.2.3", CHANGELOG, "v1.2.3 is expected"),
        ("v1.2.3", CHANGELOG.replace("2027-01-31", "unreleased"), "begins with '1.2.3 (unreleased)'"),
        ("v1.2.3", CHANGELOG.partition("## 1.2.3")[0] + "## 1.2.2 (2026-12-01)", "begins with '1.2.2 (2026-12-01)'"),
    ],
)
def test_what_does_not_agree_is_said(tag: str, changelog: str, said: str) -> None:
    (flaw,) = check_release.flaws(tag, PACKAGE, changelog)
    assert said in flaw


def test_the_texts_of_this_version_can_be_read() -> None:
    """Whether or not it is one to be published: the patterns find what they look for."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("src/obsprune/__init__.py", "CHANGELOG.md")]
    assert all("__version__" not in flaw for flaw in check_release.flaws("v" + obsprune.__version__, *texts))


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_call_scripts_that_are_there_and_nothing_else(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    called = [step["run"].removeprefix("python ").split()[0] for job in jobs for step in job["steps"] if "run" in step]
    assert called and all(name.startswith("scripts/") and (ROOT / name).is_file() for name in called)
