"""Several processes of one run on this machine, forked from the test: they need not import everything again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 120.0


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal that killed it), what it gave back, what it printed."""

    code: int
    value: Any
    out: str
    err: str


def together(size: int, work: Callable[[], Any], folder: Path) -> list[Ended]:
    """Lets `work` run in `size` processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    started = [
        context.Process(target=_child, args=(rank, size, port, work, pipes[rank][1], folder)) for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
        assert process.exitcode is not None, f"a process still waits after {PATIENCE} s"
    return [
        Ended(
            process.exitcode or 0,
            pipe.recv() if pipe.poll() else None,
            *((folder / f"{rank}.{name}").read_text() for name in ("out", "err")),
        )
        for rank, (process, (pipe, _)) in enumerate(zip(started, pipes, strict=True))
    ]


def _child(rank: int, size: int, port: int, work: Callable[[], Any], pipe: Connection, folder: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    code = 1
    try:
        pipe.send(work())
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the test's own process has to clean up is not for its children
