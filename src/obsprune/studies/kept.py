"""What a long experiment has done so far, so that a stopped one goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from obsprune import __version__
from obsprune.models.checkpoint import write_text
from obsprune.trees import Tree


@dataclass(frozen=True)
class Kept:
    """Answers in a folder. Each is called by what was asked, too, so that no other question gets it. about: what every
    question is about, settings and stamps of data.
    """

    folder: Path
    about: Tree = field(default_factory=dict)

    def once(self, name: str, asked: Tree, work: Callable[[Path], Tree]) -> Tree:
        """What the work gives, as plain values, or gave before. It gets a place of its own, which may hold what a
        stopped attempt has left there, and is gone afterwards.
        """
        digest = sha256(json.dumps([__version__, self.about, asked]).encode()).hexdigest()[:8]
        place, answer = (self.folder / f"{name}-{digest}{ending}" for ending in ("", ".json"))
        if not answer.is_file():
            write_text(answer, json.dumps(work(place)))
            shutil.rmtree(place, ignore_errors=True)
        found: Tree = json.loads(answer.read_text(encoding="utf-8"))
        return found


def stamp(path: Path) -> str:
    """Another one when the file, or any in the folder, is another: from their names, sizes and times of last change. Of
    a labels file it is that of the file, not of the images it names.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), file.stat()) for file in files]
    told = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return sha256(json.dumps(told).encode()).hexdigest()


def stamp_named(name: str) -> str:
    """`stamp` of what a data set or a task names, as PATH or KIND=PATH; empty where it is nothing on this machine."""
    paths = [Path(part).expanduser() for part in (name, name.partition("=")[2]) if part]
    return next((stamp(path) for path in paths if path.exists()), "")
