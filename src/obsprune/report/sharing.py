"""A finished result on its way to the hub: which files others get, and what is said of it there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from obsprune.engine.rundir import JOURNAL, RECIPE, REPORT
from obsprune.errors import InputError, first_line
from obsprune.models.caution import is_dir, is_file, refuse_links
from obsprune.models.checkpoint import CONFIG, MADE, PACKED_INDEX, SIDE_FILES, Checkpoint
from obsprune.models.files import SAFETENSORS
from obsprune.models.origin import CARD
from obsprune.models.packed import PackedCheckpoint
from obsprune.models.upload import Repository
from obsprune.progress import Progress
from obsprune.report.card import is_own, make_card, method, title
from obsprune.report.page import PAGES
from obsprune.report.pathless import pathless_tree
from obsprune.report.report import Report, read_report

Files = dict[str, Path | bytes]


def share(directory: Path, repository: Repository, progress: Progress) -> dict[str, Any]:
    """Uploads a finished result, dense or packed. Returns where to, and the names of the files.

    Raises InputError: before anything is sent when the directory holds no finished result or the hub does not let us.
    """
    report = read_result(directory)
    repository.require_other((report["model"].get("base") or {}).get("id"))
    files = public_files(directory, report, repository.name, progress)
    repository.prepare()
    url = repository.upload(files, message(report), progress)
    return {"url": url, "repository": repository.name, "branch": repository.branch, "files": sorted(files)}


def read_result(directory: Path) -> Report:
    """The report of a whole result. Raises InputError for every other directory."""
    if not is_dir(directory):
        raise InputError(f"there is no directory {directory}")
    report = read_report(directory)
    if not _is_finished(directory / JOURNAL) or not is_file(directory / CONFIG):
        raise InputError(f"{directory} holds an unfinished run: repeat the command that began it ({report['command']})")
    return report


def public_files(directory: Path, report: Report, name: str, progress: Progress) -> Files:
    """{name: file, or what is in it}: weights, what else from_pretrained reads, licence, card, recipe and report; of
    these three the form that has no place on this machine in it, and so of the report's pages where the directory has
    them. Never hidden files, the journal or other directories.
    """
    packed = is_file(directory / PACKED_INDEX)
    patterns = (*SIDE_FILES, CARD, RECIPE, SAFETENSORS.patterns[0])
    refuse_links(directory, patterns)
    found = {path.name: path for pattern in SIDE_FILES for path in directory.glob(pattern) if _is_public(path)}
    weights = PackedCheckpoint.open(directory).names if packed else (p.name for p in Checkpoint.open(directory).paths())
    files: Files = {key: found[key] for key in sorted(found)}
    files |= {shard: directory / shard for shard in sorted(weights)}
    _tell_places(found.values(), progress)
    return files | {
        CARD: _card(directory / CARD, report, name, packed),
        RECIPE: _recipe(directory / RECIPE),
        **_reports(directory, pathless_tree(report)),
    }


def message(report: Report) -> str:
    """Of the commit."""
    return f"{title(report)}, by {method(report)} (obsprune {report['versions']['obsprune']})"


def _is_finished(journal: Path) -> bool:
    """Whether the last line of a journal says so; a result that came without its journal is whole."""
    if not is_file(journal):
        return True
    last = journal.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
    return b'"kind": "end"' in last


def _is_public(path: Path) -> bool:
    return path.is_file() and path.name != MADE and not path.name.startswith(".")


def _card(path: Path, report: Report, name: str, packed: bool) -> bytes:
    """As the directory has it where somebody has written in it; else one that says how to load it from the hub."""
    text = path.read_text(encoding="utf-8") if is_file(path) else make_card(report)
    return make_card(report, name, packed).encode() if is_own(text, report) else text.encode()


def _recipe(path: Path) -> bytes:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return yaml.safe_dump(pathless_tree(tree), sort_keys=False, allow_unicode=True).encode()


def _reports(directory: Path, report: Report) -> Files:
    """The report, and those of its pages that the directory has, made anew. Raises InputError for a damaged one."""
    try:
        pages = {name: make(report).encode() for name, make in PAGES.items() if is_file(directory / name)}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{directory / REPORT} is not as obsprune writes it ({first_line(error)})") from error
    return {REPORT: (json.dumps(report, indent=1) + "\n").encode(), **pages}


def _tell_places(paths: Iterable[Path], progress: Progress) -> None:
    """The dense model's own files go as they are; where one names the user's home, that is said."""
    home = f'"{Path.home()}/'.encode()
    for path in paths:
        if path.name != REPORT and home in path.read_bytes():
            progress.notice(f"{path.name} names a place in {Path.home()}, and is uploaded as it is")
