"""The directory of one run: recipe, journal, finished shards. It is the truth about what is done, then the result.

Files: recipe.yaml (what was asked), progress.jsonl (the journal, one line an event), model-*.safetensors (a shard a
block, the first one for everything outside the blocks), rounds/ (the weights of rounds, while they are under way);
config.json comes last, so nothing unfinished can be loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, final

import yaml
from torch import Tensor

from obsprune.engine.kept import Names, local, require_outside
from obsprune.engine.signature import signature
from obsprune.errors import InputError, OutputError
from obsprune.models.checkpoint import Checkpoint, copy_side_files, write_index, write_shard, write_text
from obsprune.ranks import ALONE, Ranks

SUM = "crc32"
"""Of a line of the journal."""
RECIPE, JOURNAL, REPORT, ROUNDS = "recipe.yaml", "progress.jsonl", "report.json", "rounds"
Event = dict[str, Any]


@final
class RunDir:
    """One run. `open` looks, `start` creates or continues, `commit` adds a block, `finish` makes it a checkpoint.

    Of several processes the first one reads and writes; all know the same events.
    """

    def __init__(self, path: Path, events: list[Event], ranks: Ranks) -> None:
        self.path, self.events, self.ranks = path, events, ranks
        self._shards: dict[str, str] = {}
        self._facts: dict[str, str] = {}

    @classmethod
    def open(cls, path: Path, source: Path, force: bool = False, ranks: Ranks = ALONE, names: Names = ()) -> RunDir:
        """Looks at the output directory without touching it (with `force`, a former run there is deleted by `start`).

        names: of data and models that are read, too. Raises InputError when it holds anything but an unfinished run.
        """
        run = cls(path, ranks.told(lambda: _looked_at(path, [source, *local(names)], force)), ranks)
        if run.recorded("end") is not None:
            raise InputError(
                f"{path} holds a finished run; see 'obsprune inspect {path}', or use --force or another -o"
            )
        return run

    def start(self, recipe: Mapping[str, Any], facts: Mapping[str, Any], blocks: list[str], bytes_needed: int) -> bool:
        """Creates the directory, or continues there; True when it continues.

        facts: all that decides the bytes of the result (settings, versions, hashes). Raises InputError with the
        differences when the unfinished run there is another one, or when the disk is too small.
        """
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        total = len(blocks) + 1
        self._shards = {
            name: f"model-{index:05d}-of-{total:05d}.safetensors" for index, name in enumerate(["", *blocks], 1)
        }
        self._facts = signature(recipe)
        continues = bool(self.events)
        if continues:
            before = (self.recorded("start") or {}).get("facts", {})
            self.ranks.told(lambda: _require_same(self.path, before, facts))
        else:
            self.ranks.told(lambda: self._create(bytes_needed))
            self.record("start", facts=facts)  # first, so that what a kill leaves here is known to be ours
        self.ranks.told(lambda: write_text(self.path / RECIPE, text))
        self.ranks.agree(self._require_seen)
        return continues

    def _require_seen(self) -> None:
        """Other machines must find here what the first process has written."""
        journal = self.path / JOURNAL
        if not journal.is_file() or _read_journal(journal) != self.events:
            raise InputError(
                f"process {self.ranks.rank} does not see {self.path.absolute()} as the first process does: give an "
                "absolute -o, on a disk that all machines share"
            )

    def _create(self, bytes_needed: int) -> None:
        self._require_space(bytes_needed)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _empty(self.path)
        except OSError as error:
            raise InputError(f"cannot create {self.path}: {error.strerror}; choose another -o") from error

    @property
    def disk(self) -> Path:
        """A directory that is there already, on the disk that the run goes to."""
        return next(path for path in [self.path, *self.path.resolve().parents] if path.is_dir())

    def _require_space(self, needed: int) -> None:
        parent = self.disk
        free = shutil.disk_usage(parent).free + bytes_in(self.path)
        if free < needed:
            raise InputError(
                f"the result needs {needed / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free; "
                "make room or choose another -o"
            )

    def record(self, kind: str, **payload: Any) -> Event:
        """Adds one line to the journal and sees it to the disk; returns it as it will be read."""
        self.events.append(self.ranks.told(lambda: _written(self.path / JOURNAL, {"kind": kind, **payload})))
        return self.events[-1]

    def recorded(self, kind: str, **match: Any) -> Event | None:
        """The last event of this kind whose fields equal `match`."""
        found = [
            e for e in self.events if e["kind"] == kind and all(e.get(key) == value for key, value in match.items())
        ]
        return found[-1] if found else None

    def commit(
        self, block: str, tensors: Mapping[str, Tensor], matrices: list[Event], seconds: float, **facts: Any
    ) -> None:
        """Writes a finished block: first the shard, then the line that says so."""
        self.ranks.told(lambda: write_shard(self.path / self._shards[block], tensors, self._facts))
        self.record("block", name=block, matrices=matrices, seconds=seconds, **facts)

    def committed(self, block: str) -> Path | None:
        """The shard of a block that is done."""
        path = self.path / self._shards[block]
        return path if self.recorded("block", name=block) and path.is_file() else None

    def trial(self, name: str) -> RunDir:
        """A run inside this one, another way to the same blocks; continued where it was left."""
        path = self.path / ROUNDS / f"trial-{name}"
        trial = RunDir(path, self.ranks.told(lambda: _begun(path)), self.ranks)
        trial._shards, trial._facts = self._shards, self._facts
        return trial

    def adopt(self, trial: RunDir) -> None:
        """Takes over the blocks of a trial."""
        for block, shard in self._shards.items():
            if self.ranks.told(partial(trial.committed, block)):
                self._rename(trial.path / shard, self.path / shard)
                self.record(**(trial.recorded("block", name=block) or {}))
        self.ranks.told(lambda: shutil.rmtree(trial.path))

    def _rename(self, old: Path, new: Path) -> None:
        self.ranks.wait()  # nobody reads it there any more
        self.ranks.told(lambda: old.replace(new))

    def iterate(self, number: int) -> Path:
        """Where the weights of a round after the first lie until the run is finished."""
        return self.path / ROUNDS / str(number)

    def forget(self, but: Collection[int]) -> None:
        """Deletes the weights of all rounds but these."""
        self.ranks.wait()  # nobody reads them any more
        self.ranks.told(lambda: self._forget(but))

    def _forget(self, but: Collection[int]) -> None:
        for path in (self.path / ROUNDS).glob("[0-9]*"):
            if int(path.name) not in but:
                shutil.rmtree(path, ignore_errors=True)

    def discard(self, trial: RunDir) -> None:
        """Deletes a trial that is not taken over."""
        self.ranks.wait()
        self.ranks.told(lambda: shutil.rmtree(trial.path))

    @property
    def scratch(self) -> Path:
        """For files that need not outlive this process."""
        return self.path / ROUNDS / f"scratch-{self.ranks.rank}"

    def summary(self, block: str) -> str:
        """One line about a finished block."""
        event = self.recorded("block", name=block)
        if not event or not event["matrices"]:
            return f"{block}  nothing to prune"
        worst = max(event["matrices"], key=lambda matrix: matrix["error"])
        found = f"worst error {worst['error']:.4f} ({worst['name'].rpartition('.')[2]})"
        match = event.get("matching")
        matched = f", block error {match['before']:.3g}, matched {match['after']:.3g}" if match else ""
        return f"{block}  {event['seconds']:.1f} s  {found}{matched}"

    def finish(self, checkpoint: Checkpoint, rest: list[str]) -> None:
        """Everything outside the blocks as stored, index, tokenizer, and last the config: now it can be loaded."""
        self.ranks.wait()  # nobody reads a former iterate any more
        self.ranks.told(lambda: self._completed(checkpoint, rest))

    def _completed(self, checkpoint: Checkpoint, rest: list[str]) -> None:
        write_shard(self.path / self._shards[""], checkpoint.read(rest), self._facts)
        write_index(self.path)
        copy_side_files(checkpoint.directory, self.path)
        shutil.rmtree(self.path / ROUNDS, ignore_errors=True)

    def abandon(self) -> None:
        """Removes the directory when nothing was committed to it, nor to a trial in it."""
        begun = self.recorded("block") or self.recorded("step") or any((self.path / ROUNDS).glob(f"trial-*/{JOURNAL}"))
        if self.ranks.first and self.path.is_dir() and (self.path / JOURNAL).is_file() and not begun:
            _empty(self.path)
            with suppress(OSError):  # a mount point or a link stays, empty
                self.path.rmdir()


def bytes_in(path: Path) -> int:
    """Of a former run there, which is continued or deleted; 0 where there is none."""
    if not (path / JOURNAL).is_file():
        return 0
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def _looked_at(path: Path, read: list[Path], force: bool) -> list[Event]:
    """The events of an unfinished run there, none where a new one may begin."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; choose another -o")
    require_outside(path, read)
    empty = not path.is_dir() or not any(path.iterdir())
    if not empty and not (path / JOURNAL).is_file():
        raise InputError(f"{path} is not empty and was not made by obsprune; choose another -o, or empty it yourself")
    return [] if empty or force else _read_journal(path / JOURNAL)


def _begun(path: Path) -> list[Event]:
    """The events of a trial in its directory, which is made where there is none."""
    path.mkdir(parents=True, exist_ok=True)
    return _read_journal(path / JOURNAL) if (path / JOURNAL).is_file() else []


def _written(journal: Path, event: Event) -> Event:
    """An event as it will be read, once it is seen to the disk."""
    try:
        with journal.open("a", encoding="utf-8") as file:
            file.write(_line(event))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {journal}: {error.strerror}; make room, then repeat the command") from error
    found: Event = json.loads(json.dumps(event))
    return found


def _empty(directory: Path) -> None:
    """Deletes everything inside, the journal last: until then the directory is known to be ours."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name == JOURNAL):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _read_journal(path: Path) -> list[Event]:
    """All whole lines; a torn last one (a kill inside a write) is cut off the file."""
    events, torn = _whole(path, "use --force or another -o")
    if torn:
        write_text(path, "".join(map(_line, events)))
    return events


def read_events(path: Path) -> list[Event]:
    """All whole lines of a journal, which stays as it is. Raises InputError when it is damaged."""
    return _whole(path, "without this file the run can still be shown, but not be tested against others")[0]


def _whole(path: Path, remedy: str) -> tuple[list[Event], bytes]:
    """The events of whole lines, and what follows them."""
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    try:
        return [_event(line) for line in whole.splitlines() if line], torn
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); {remedy}") from error


def _line(event: Event) -> str:
    """As the journal has it: with a sum, so that a damaged line is known."""
    return json.dumps(event | {SUM: zlib.crc32(json.dumps(event).encode())}) + "\n"


def _event(line: bytes) -> Event:
    """Raises ValueError for a line that is not as it was written."""
    event: Event = json.loads(line)
    told = event.pop(SUM, None) if isinstance(event, dict) else None
    if told != zlib.crc32(json.dumps(event).encode()):
        raise ValueError("a line's sum is not right, or another version wrote it")
    return event


def _require_same(path: Path, before: Event, now: Mapping[str, Any]) -> None:
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    changed = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    if changed:
        raise InputError(
            f"{path} holds an unfinished run of another recipe ({'; '.join(changed)}); "
            "repeat the old command to finish it, or use --force or another -o"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, part in tree.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }
