"""Prints the table of docs/reliability.md: inputs of every kind damaged at random, and what becomes of them.

python scripts/damage.py [--cases N]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage inputs and print what becomes of them.")
    parser.add_argument("--cases", type=int, default=100, help="Of each kind.")
    parser.add_argument("--only", default="", help="Kinds whose name holds this.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "DATASETS_VERBOSITY": "critical", "HF_DATASETS_CACHE": f"{folder}/cache"}
        os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        import torch
        from damage import SUBJECTS, Whole, page, tried

        torch.set_num_threads(1)
        rows: dict[str, Counter[str]] = {}
        for name, make in SUBJECTS.items():
            if asked.only in name:
                rows[name] = tried(make(Whole(Path(folder) / f"{len(rows)}")), asked.cases)
                print(f"{name}: {dict(rows[name])}", file=sys.stderr, flush=True)
    print(page(rows))


if __name__ == "__main__":
    main()
