"""Runs the command line in a process of its own and watches its anonymous memory (mapped files do not count)."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from obsprune.models import activations

MB = 2**20


@dataclass(frozen=True)
class Anonymous:
    """Bytes: once everything is imported, and at most from then on; seconds of the command."""

    imported: int
    peak: int
    seconds: float

    @property
    def growth(self) -> int:
        return self.peak - self.imported


def measured(words: list[str], cwd: Path, at_once: int = activations.AT_ONCE) -> Anonymous:
    """at_once: tensors of so many bytes and more are mapped for themselves. Smaller ones, once freed, stay in glibc's
    heap until the next stop of the walk, and which of them it uses again is chance.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(at_once), *words], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Anonymous(**json.loads(done.stdout.splitlines()[-1]))


def now() -> int:
    """RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    import time

    import torch

    for module in ("obsprune.pipeline", "obsprune.cli.tables", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)
    torch.set_num_threads(1)
    activations.AT_ONCE = int(sys.argv[1])
    from obsprune.cli import app

    imported, done = now(), threading.Event()
    seen = [imported]

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(max(seen.pop(), now()))

    watcher, start = threading.Thread(target=watch), time.monotonic()
    watcher.start()
    try:
        app(sys.argv[2:], standalone_mode=False)
    finally:
        done.set()
        watcher.join()
    print(json.dumps(asdict(Anonymous(imported, *seen, time.monotonic() - start))))


if __name__ == "__main__":
    main()
