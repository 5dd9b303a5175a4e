"""Prints the figures of docs/reliability.md: kills survived, and anonymous memory against the size of a model.

    python scripts/reliability.py kills [--random 20]
    python scripts/reliability.py memory --gb 0.75 1.5 3 [--activations device disk] [-- MORE FLAGS OF PRUNE]

`kills` takes some minutes of one core; `memory` about half an hour, and twice the disk space of its largest model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SAMPLES = ["--nsamples", "8", "--seqlen", "128", "--set", "data.heldout=2", "--eval", "heldout", "-q", "--force"]


def kills(count: int) -> None:
    from killing import KILLED
    from kills import POINTS, tried

    print("| where | kind of run | killed | bytes equal |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        found = tried(Path(folder), POINTS, at_random=count)
    for name, (told, same) in found.items():
        title, _, kind = (name, "", POINTS[name][0]) if name in POINTS else name.partition(": ")
        print(f"| {title} | {kind} | {told.status.count(KILLED)} | {'yes' if same else 'NO'} |")
    killed = sum(told.status.count(KILLED) for told, _ in found.values())
    print(f"{len(found)} runs, {killed} kills, {sum(same for _, same in found.values())} runs with equal bytes")


def memory(sizes: list[float], places: list[str], more: list[str]) -> None:
    from anonymous import MB, measured
    from make_random_model import make

    print("| model | layers | activations | anonymous memory over the imports | seconds |\n|---|---|---|---|---|")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            depth = make(model, size, 1024, "float32", 16, 128)
            for place in places:
                words = ["prune", str(model), "--dataset", f"{model}/tokens.safetensors", *SAMPLES, "-o", "out"]
                found = measured([*words, "--activations", place, *more], Path(folder))
                print(
                    f"| {size:g} GB | {depth} | {place} | +{found.growth / MB:.0f} MiB | {found.seconds:.0f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("kills")
    verb.add_argument("--random", type=int, default=20)
    verb = verbs.add_parser("memory")
    verb.add_argument("--gb", type=float, nargs="+", default=[0.75, 1.5, 3])
    verb.add_argument("--activations", nargs="+", default=["device", "disk"])
    verb.add_argument("more", nargs="*", default=[])
    a = parser.parse_args()
    if a.verb == "kills":
        kills(a.random)
    else:
        memory(a.gb, a.activations, a.more or ["--solver", "wanda"])


if __name__ == "__main__":
    main()
