"""When a Linear layer in CSR is faster than the dense one: python scripts/csr_linear.py (a table of docs/inference.md).

Random weights in float32, zeros at random places; dense and CSR by turns. On one thread (OMP_NUM_THREADS=1) times are
those of the thread, which other work on the machine disturbs little; on several, those of the clock on the wall.

A ratio is dense time / CSR time: of the medians, and in brackets what the quartiles of both leave open. Bold: faster
beyond them.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch import nn

from obsprune.evaluate.latency import AS_FAST, Bench, Times
from obsprune.evaluate.workloads import Clock, Done, Workload
from obsprune.models.csr import CsrLinear
from obsprune.progress import Silent


class Product(Workload):
    """So many products of one layer as are worth a look at the clock."""

    phases, said = ("product",), "products"

    def __init__(self, width: int, often: int) -> None:
        self.width, self.often = width, often

    def inputs(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, self.width, generator=torch.Generator().manual_seed(0))

    def run(self, network: nn.Module, inputs: torch.Tensor, clock: Clock) -> Done:
        began = clock()
        for _ in range(self.often):
            output = network(inputs)
        return Done({"product": (clock() - began) / self.often}, output)


def layer(width: int, sparsity: float) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(width, width, bias=False).requires_grad_(False)
    made.weight.copy_(torch.randn(width, width, generator=generator))
    made.weight.mul_(torch.rand(width, width, generator=generator) >= sparsity)
    return made


def cell(dense: Times, csr: Times) -> str:
    (low, high), (least, most) = csr.quartiles, dense.quartiles
    ratio = f"{csr.ratio(dense):.2f} ({least / high:.2f}–{most / low:.2f})"
    return f"**{ratio}**" if csr.against(dense).endswith(AS_FAST) else ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--often", type=int, default=4)
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    threads = torch.get_num_threads()
    clock = time.thread_time if threads == 1 else time.perf_counter
    print(f"threads: {threads}, torch {torch.__version__}")
    print("| width | rows | dense ms |", " | ".join(f"{share:.0%}" for share in a.sparsities), "|")
    print("|---:|---:|---:|" + "---:|" * len(a.sparsities))
    for width in a.widths:
        layers = {share: layer(width, share) for share in a.sparsities}
        networks = {"dense": layers[a.sparsities[0]]} | {f"{share}": CsrLinear.of(x) for share, x in layers.items()}
        for batch in a.batches:
            bench = Bench(Product(width, a.often), clock, 3, a.repeats)
            found = bench.measure(networks, batch, Silent())["product"]
            dense = found.pop("dense")
            cells = [f"{width}", f"{batch}", f"{1e3 * dense.median:.2f}", *(cell(dense, x) for x in found.values())]
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
