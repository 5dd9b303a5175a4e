"""How much memory a run takes at most, watched while it works."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import final

import psutil
import torch

INTERVAL = 0.02
"""Seconds between two looks: a factorisation or a batch that is over sooner may be missed."""
STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind (Linux' RssAnon): pages of a mapped checkpoint are not in it,
    which the kernel takes back when it likes. Elsewhere all that is resident.
    """
    if not STATUS.is_file():
        return int(psutil.Process().memory_info().rss)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@final
class MemoryWatch:
    """A context manager. peak: the most bytes since it was entered, on the host and, where there is one, the device."""

    def __init__(self) -> None:
        self._host, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> MemoryWatch:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self._host = max(self._host, anonymous_bytes())
            if self._over.wait(INTERVAL):
                return

    @property
    def peak(self) -> dict[str, int]:
        """{host_bytes: anonymous memory, device_bytes: what torch had allocated there}."""
        found = {"host_bytes": max(self._host, anonymous_bytes())}
        if torch.cuda.is_available():
            found["device_bytes"] = torch.cuda.max_memory_allocated()
        return found
