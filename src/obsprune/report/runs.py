"""A finished run as its directory tells it: report, scores item by item, size on the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from obsprune.engine.rundir import JOURNAL, REPORT, Event, read_events
from obsprune.errors import InputError
from obsprune.models.caution import is_dir, is_file
from obsprune.models.checkpoint import PACKED_INDEX
from obsprune.models.files import SAFETENSORS
from obsprune.report.report import Report, read_report

ASKED = ("metric", "sha256", "seqlen", "stride", "num_fewshot", "limit")
"""What of a score's protocol must be equal; the hash is of the material, not of how it is cut."""
Tree = dict[str, Any]
Asked = tuple[Any, ...]
Items = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Run:
    """A finished run. events: of its journal, none where it came without."""

    name: str
    path: Path
    report: Report
    events: Sequence[Event]

    @cached_property
    def scores(self) -> dict[Asked, tuple[str, Tree]]:
        """{what was asked: (task, scores of dense, pruned, tuned)}."""
        return {asked(pair[whose(pair)]): (task, pair) for task, pair in self.report["evaluation"].items()}

    def items(self, key: Asked) -> Items:
        """The result's scores item by item; none where they are not known."""
        who = whose(self.scores[key][1])
        found = [e for e in self.events if e["kind"] == "score" and e["who"] == who and asked(e) == key]
        return found[-1]["items"] if found else {}

    @property
    def source(self) -> str:
        """The dense model: its id on the hub, the teacher of a fine-tuned one, or the directory it was in."""
        model, teacher = self.report["model"], self.report["recipe"].get("tuning", {}).get("teacher")
        return model["base"]["id"] if model.get("base") else Path(teacher or model["source"]).name

    @property
    def left(self) -> int:
        """Numbers of the model that are not zero."""
        return int(self.report["model"]["parameters"]) - int(self.report["sparsity"]["zeros"])

    @property
    def packed(self) -> bool:
        """Whether the weights lie there packed."""
        return is_file(self.path / PACKED_INDEX)

    @property
    def disk(self) -> int | None:
        """Bytes of the weights as they lie there."""
        sizes = [path.stat().st_size for pattern in SAFETENSORS.patterns for path in self.path.glob(pattern)]
        return sum(sizes) or None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The finished runs in these directories. Raises InputError for a directory that holds none, or is named twice."""
    places = [path.resolve() for path in paths]
    for index, path in enumerate(paths):
        if places[index] in places[:index]:
            raise InputError(f"{path} is named twice; name each run once")
    names = [place.name for place in places]
    return [
        _read_run(path, place.name if names.count(place.name) == 1 else str(path))
        for path, place in zip(paths, places, strict=True)
    ]


def _read_run(path: Path, name: str) -> Run:
    if not is_dir(path):
        raise InputError(f"there is no directory {path}; name the directories of finished runs")
    events = read_events(path / JOURNAL) if is_file(path / JOURNAL) else []
    if events and events[-1]["kind"] != "end":
        command = f" ({read_report(path)['command']})" if is_file(path / REPORT) else ""
        raise InputError(f"{path} holds an unfinished run: repeat the command that began it{command}")
    return Run(name, path, read_report(path), events)


def whose(pair: Tree) -> str:
    """Whose score the result's is."""
    return "tuned" if "tuned" in pair else "pruned"


def asked(score: Mapping[str, Any]) -> Asked:
    """Equal for scores that can be compared."""
    return tuple(score.get(key) for key in ASKED)
