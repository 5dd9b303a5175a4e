"""Latency at several sparsities: python scripts/inference_table.py CHECKPOINT... (a table of docs/inference.md).

Each model's matrices are pruned by magnitude, and the copy is measured as `obsprune bench-inference` does it; on one
thread (OMP_NUM_THREADS=1) in the time of the thread, which other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch

from obsprune.core.patterns import Unstructured
from obsprune.evaluate.inference import Asked, bench_inference
from obsprune.evaluate.latency import AS_FAST
from obsprune.models.load import outline
from obsprune.models.ready import make_ready
from obsprune.progress import Silent


def pruned(name: str, sparsity: float, folder: Path) -> Path:
    """A copy of a checkpoint in float32, its blocks' matrices pruned by magnitude."""
    ready = make_ready(name, device="cpu", dtype="float32")
    for matrix in outline(name, device="cpu").matrices:
        weight = ready.network.get_parameter(matrix.parameter)
        weight.mul_(Unstructured(sparsity).keep(weight.abs()))
    ready.network.save_pretrained(folder)
    for file in ready.directory.glob("preprocessor_config.json"):
        shutil.copy(file, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--csr-from", type=float, default=0.5, help="below what the command tries, to see why")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    threads = torch.get_num_threads()
    clock = time.thread_time if threads == 1 else time.perf_counter
    asked = Asked(a.batches, None, a.new, a.repeats, csr_from=a.csr_from, clock=clock)
    print(f"threads: {threads}, torch {torch.__version__}")
    print("| model | zeros | dense MB | CSR MB | batch | phase | dense ms | CSR ms | ratio | |")
    print("|---|---:|---:|---:|---:|---|---:|---:|---:|---|")
    for name in a.checkpoints:
        for sparsity in a.sparsities:
            with tempfile.TemporaryDirectory() as folder:
                found = bench_inference(str(pruned(name, sparsity, Path(folder))), Silent(), None, asked, device="cpu")
            sizes = [f"{one['bytes'] / 1e6:.1f}" for one in found["forms"].values()]
            for dense, csr in zip(found["rows"][::2], found["rows"][1::2], strict=True):
                verdict = csr["verdict"] if not csr["verdict"].endswith(AS_FAST) else f"**{csr['verdict']}**"
                times = [f"{1e3 * row['seconds']['median']:.3g}" for row in (dense, csr)]
                cells = [Path(name).name, f"{sparsity:.0%}", *sizes, dense["batch"], dense["phase"], *times]
                print("|", " | ".join(map(str, [*cells, f"{csr['ratio']:.2f}", verdict])), "|", flush=True)


if __name__ == "__main__":
    main()
