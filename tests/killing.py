"""Runs the command line in forks of one process that has imported everything, and kills them where it is told.

A Story is a command that is repeated until it is through, each attempt but the last with an end of its own. `Forks` is
the process (no threads, so that a fork is safe); it says what became of each attempt.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

UNLIKE = {"seconds", "spent", "peak_memory_bytes", "memory", "command", "output"}
"""What a report says about the process, not about the result."""
KILLED = -signal.SIGKILL
"""The status of what was killed."""


@dataclass(frozen=True)
class End:
    """How an attempt ends: at call number `call` of `at` (module:name), before it, by a signal; inside a write of
    `write_atomic`, with so much of the file written (`share`; 1: all, but without its name); after so many seconds; or
    because no file may grow beyond `room` bytes.
    """

    at: str = ""
    call: int = 1
    share: float | None = None
    seconds: float | None = None
    room: int | None = None
    sign: int = int(signal.SIGKILL)


@dataclass(frozen=True)
class Story:
    words: list[str]
    cwd: str
    ends: list[End] = field(default_factory=list)


@dataclass(frozen=True)
class Told:
    """status of each attempt: exit code, or minus the signal; seconds; the last one's stderr and those before it."""

    status: list[int]
    seconds: list[float]
    stderr: list[str]


@final
class Forks:
    """A context manager: the process that carries stories out."""

    def __enter__(self) -> Forks:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # without a further story it ends

    def tell(self, stories: list[Story]) -> list[Told]:
        assert self._process.stdin and self._process.stdout
        print(json.dumps([asdict(story) for story in stories]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process that forks has ended"
        return [Told(**told) for told in json.loads(answer)]


def contents(directory: Path) -> dict[str, Any]:
    """The hash of every file of a result; of the report, what is about the result, and whether its pages are those of
    this report; not the journal.
    """
    from obsprune.report.page import PAGES

    others = {"progress.jsonl", "report.json", *PAGES}
    files = [path for path in directory.rglob("*") if path.is_file() and path.name not in others]
    found: dict[str, Any] = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    report = json.loads((directory / "report.json").read_text())
    pages = {name: (directory / name).read_text() == make(report) for name, make in PAGES.items()}
    return found | pages | {"report.json": _alike(report)}


def _alike(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _alike(value) for key, value in tree.items() if key not in UNLIKE}
    return [_alike(value) for value in tree] if isinstance(tree, list) else tree


def _attempt(story: Story, end: End | None) -> tuple[int, float, str]:
    log, start = Path(story.cwd) / "stderr.txt", time.monotonic()
    child = os.fork()
    if child == 0:
        os.chdir(story.cwd)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(_run(story.words, end))
    if end and end.seconds is not None:
        time.sleep(end.seconds)
        os.kill(child, end.sign)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, time.monotonic() - start, log.read_text()


def _run(words: list[str], end: End | None) -> int:
    from obsprune.cli import app

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    if end:
        _arrange(end)
    try:
        app(words)
    except SystemExit as done:
        return int(done.code or 0)
    except BaseException:  # what no command should let out
        import traceback

        traceback.print_exc()
        return 70
    return 0


def _arrange(end: End) -> None:
    if end.room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (end.room, end.room))
    if not end.at:
        return
    module, _, name = end.at.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real, calls = getattr(owner, last), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == end.call:
            if end.share is not None:
                _leave_half(end.share, *args)
            os.kill(os.getpid(), end.sign)
            time.sleep(1 if end.sign == signal.SIGKILL else 0)
        return real(*args, **kwargs)

    setattr(owner, last, counted)


def _leave_half(share: float, *args: Any) -> None:
    """What a kill inside write_atomic(path, write), or inside RunDir.record(kind), leaves."""
    if isinstance(args[0], Path):
        path, write = args
        temporary = path.with_name(f".{path.name}.partial")
        write(temporary)
        os.truncate(temporary, int(share * temporary.stat().st_size))
    else:
        run, kind = args
        with (run.path / "progress.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, "name": "cut off"})[: 1 + int(share * 20)])


def main() -> None:
    import torch

    for module in ("obsprune.outlook", "obsprune.presets", "obsprune.engine.distributed", "obsprune.cli.tables"):
        importlib.import_module(module)
    importlib.import_module("transformers.models.llama.modeling_llama")
    torch.set_num_threads(1)
    importlib.import_module("obsprune.models.activations").LEAST = 1  # tiny models, too, have something on disk
    for line in sys.stdin:
        found = []
        for plain in json.loads(line):
            story = Story(plain["words"], plain["cwd"], [End(**end) for end in plain["ends"]])
            Path(story.cwd).mkdir(parents=True, exist_ok=True)
            parts = [_attempt(story, end) for end in [*story.ends, None]]
            found.append(Told(*([part[i] for part in parts] for i in range(3))))  # type: ignore[arg-type]
        print(json.dumps([asdict(told) for told in found]), flush=True)


if __name__ == "__main__":
    main()
