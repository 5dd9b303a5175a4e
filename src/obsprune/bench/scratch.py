"""A folder for gigabytes that goes when the process does, however that ends."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obsprune.errors import InputError

PREFIX = "obsprune-bench-"
UNDERTAKER = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
"""Waits until nobody holds the other end of its pipe any more, which a killed process does not either."""


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """An empty folder in `parent` (None: where temporary files go), deleted at the end by a process of its own.

    Raises InputError where none can be made.
    """
    where = parent or Path(tempfile.gettempdir())
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))
    except OSError as error:
        raise InputError(f"cannot write in {where}: {error.strerror}; choose another --workdir") from error
    command = [sys.executable, "-c", UNDERTAKER, str(folder)]
    undertaker = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        undertaker.communicate()
