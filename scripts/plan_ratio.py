"""How near `--dry-run` comes to what a run then takes: estimate over actual, of time and of memory.

    OMP_NUM_THREADS=1 python scripts/plan_ratio.py MODEL [--cpu] [words of obsprune prune]

Both run in a process of their own. `--cpu` counts seconds of the processor instead of the clock's, for machines that do
other things meanwhile (one thread; waiting for a disk is then not in it). Only ratios are printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

RUN = "from obsprune.cli import main; main()"
COUNTED = "import time; time.perf_counter = time.process_time; "


def told(cpu: bool, *words: str) -> dict[str, Any]:
    """What a command says for machines."""
    code = (COUNTED if cpu else "") + RUN
    done = subprocess.run([sys.executable, "-c", code, *words, "--json"], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Plan, run, compare."""
    words = [word for word in sys.argv[1:] if word != "--cpu"]
    cpu = len(words) < len(sys.argv) - 1
    with tempfile.TemporaryDirectory() as folder:
        command = ["prune", *words, "-o", f"{folder}/out"]
        plan, report = told(cpu, *command, "--dry-run"), told(cpu, *command)
    print(" ".join(words))
    print(f"  time    {plan['seconds']['total'] / report['seconds']['total']:.2f}")
    for part in ("pruning", "rounds", "allocation", "evaluation"):
        if plan["seconds"].get(part) and report["seconds"][part]:
            print(f"    {part} {plan['seconds'][part] / report['seconds'][part]:.2f}")
    for part, most in report["memory"].items():
        print(f"  {part.removesuffix('_bytes')} memory {plan['memory'][part] / most:.2f}")


if __name__ == "__main__":
    main()
