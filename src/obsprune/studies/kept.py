"""What a long experiment has done so far, so that a stopped one goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from obsprune import __version__
from obsprune.models.checkpoint import write_text
from obsprune.trees import Tree


@dataclass(frozen=True)
class Kept:
    """Answers in a folder. Each is called by what was asked, too, so that no other question gets it."""

    folder: Path

    def once(self, name: str, asked: Tree, work: Callable[[Path], Tree]) -> Tree:
        """What the work gives, as plain values, or gave before. It gets a place of its own, which may hold what a
        stopped attempt has left there, and is gone afterwards.
        """
        digest = sha256(json.dumps([__version__, asked]).encode()).hexdigest()[:8]
        place, answer = (self.folder / f"{name}-{digest}{ending}" for ending in ("", ".json"))
        if not answer.is_file():
            write_text(answer, json.dumps(work(place)))
            shutil.rmtree(place, ignore_errors=True)
        found: Tree = json.loads(answer.read_text(encoding="utf-8"))
        return found
