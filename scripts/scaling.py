"""The arithmetic of docs/scaling.md: how time, memory and traffic of one shot and of a round grow with model and GPUs.

    python scripts/scaling.py            prints the tables, as they stand on the page

Everything is computed from shapes and from the rates below. Nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

TOKENS = 128 * 2048
"""Of calibration."""
HELD = 16 * 2048
"""Of those that judge, where there is a dense stream."""
STEPS = 32
"""Optimizer steps of a round's fine-tuning pass."""
SIZES = 8
"""Step sizes of a first round, each a solve of every matrix."""
PENALTIES, INNER, POLISH = 8, 6, 20
"""Of ADMM: factorisations a Gram, iterations at each, PCG steps at the end."""
PART = 2048
"""Rows of a Gram that are made at a time, up to the diagonal (core/products.py)."""


@dataclass(frozen=True)
class Device:
    """Assumed rates. dense, quick, single: flop/s of bf16, TF32 and float32 products; memory: bytes/s; link, net:
    bytes/s of one GPU inside its node and of one node; bytes: of memory.
    """

    name: str
    dense: float
    quick: float
    single: float
    memory: float
    link: float
    net: float
    bytes: float


DEVICES = [
    Device("A100 80 GB", 312e12, 156e12, 19.5e12, 2.0e12, 300e9, 200e9, 80e9),
    Device("H100 80 GB", 989e12, 495e12, 67e12, 3.35e12, 450e9, 400e9, 80e9),
    Device("H200 141 GB", 989e12, 495e12, 67e12, 4.8e12, 450e9, 400e9, 141e9),
]
DISK = 10e9
"""Bytes/s that one node reads from a shared disk, whoever else reads."""
EFFICIENCY = 0.5
"""The share of its rate that a large product reaches; of a factorisation a quarter."""
FACTORING = 0.25


@dataclass(frozen=True)
class Llama:
    """Shapes of a Llama: d model width, f width of the MLP, kv width of keys and values."""

    name: str
    layers: int
    d: int
    f: int
    kv: int
    vocabulary: int = 128256

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """{name: (R outputs, C inputs)} of one block."""
        d, f, kv = self.d, self.f, self.kv
        square = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
        return square | {"gate": (f, d), "up": (f, d), "down": (d, f)}

    @property
    def groups(self) -> list[tuple[int, list[str]]]:
        """Inputs C of each distinct input, and the matrices that share it."""
        return [(self.d, ["q", "k", "v"]), (self.d, ["o"]), (self.d, ["gate", "up"]), (self.f, ["down"])]

    @property
    def passes(self) -> float:
        """Forwards of a block with two streams, in weights used: for each input both models run up to the last matrix
        that has it, or past it where it writes to the residual stream; then both give their outputs.
        """
        m = {name: r * c for name, (r, c) in self.matrices.items()}
        ends = [("q", "k"), ("q", "k", "v", "o"), ("q", "k", "v", "o", "gate"), tuple(m)]
        return 2 * sum(sum(m[name] for name in used) for used in ends) / self.block + 2

    @property
    def block(self) -> int:
        """Weights of one block's matrices."""
        return sum(r * c for r, c in self.matrices.values())

    @property
    def parameters(self) -> int:
        return self.layers * self.block + 2 * self.vocabulary * self.d


MODELS = [
    Llama("Llama-2-7B", 32, 4096, 11008, 4096, 32000),
    Llama("Llama-3-70B", 80, 8192, 28672, 1024),
    Llama("Llama-3-405B", 126, 16384, 53248, 1024),
]


# ------------------------------------------------------------------------------------------------ flops


def forward(model: Llama, tokens: int) -> float:
    """2 x weights x tokens of one block; attention itself is a few per cent at 2048 tokens, and left out."""
    return 2.0 * model.block * tokens


def gram(c: int, tokens: int) -> float:
    """Σ x xᵀ: T C², and the other half of what is on the diagonal."""
    return sum(2.0 * tokens * min(PART, c - start) * min(start + PART, c) for start in range(0, c, PART))


def grams(model: Llama, tokens: int) -> float:
    return sum(gram(c, tokens) for c, _ in model.groups)


def factorisation(c: int) -> float:
    """SparseGPT's part that depends on the inputs only: a Cholesky, C³/3."""
    return c**3 / 3


def sweep(r: int, c: int) -> float:
    """SparseGPT on one matrix: every column updates those to its right, R C² / 2 multiply-adds."""
    return 1.0 * r * c * c


def ladder(c: int) -> float:
    """ADMM's part that depends on the inputs only: a Cholesky and an inverse for each penalty."""
    return PENALTIES * c**3


def search(r: int, c: int) -> float:
    """ADMM on one matrix: products R C² of all inner steps."""
    return 2.0 * r * c * c * PENALTIES * INNER


def polish(r: int, c: int) -> float:
    """Of the start, and of the steps on the final mask."""
    return 2.0 * r * c * c * (POLISH + 3)


# ------------------------------------------------------------------------------------------------ seconds


def seconds_factoring(flops: float, device: Device) -> float:
    return flops / (FACTORING * device.single)


def seconds_single(flops: float, device: Device) -> float:
    return flops / (EFFICIENCY * device.single)


def seconds_quick(flops: float, device: Device) -> float:
    return flops / (EFFICIENCY * device.quick)


def seconds_dense(flops: float, device: Device) -> float:
    return flops / (EFFICIENCY * device.dense)


@dataclass(frozen=True)
class Solver:
    """prepare: seconds for inputs C, once for every owner of a matrix with them; one: seconds of a matrix [R, C]."""

    prepare: Callable[[int, Device], float]
    one: Callable[[int, int, Device], float]


SPARSEGPT = Solver(
    lambda c, device: seconds_factoring(factorisation(c), device), lambda r, c, device: sequential(r, c, device)
)
ADMM = Solver(
    lambda c, device: seconds_factoring(ladder(c) + c**3 / 3, device),
    lambda r, c, device: seconds_quick(search(r, c), device) + seconds_single(polish(r, c) + 2.0 * r * c * c, device),
)
"""With the corrected target: one factorisation more, and its solution for R rows."""


def sequential(r: int, c: int, device: Device) -> float:
    """A sweep: its flops, and for every tile of 128 columns some twenty launches of 5 µs, each a pass over the tile."""
    tile = 2 * 4 * r * 128 / device.memory
    return seconds_single(sweep(r, c), device) + c / 128 * 20 * (5e-6 + tile)


def owned(model: Llama, names: Sequence[str], gpus: int) -> list[list[str]]:
    """The matrices of each owner: by falling cost C² (C + R), each to who has least (engine/dealing.py)."""
    costs = {name: c * c * (c + r) for name in names for r, c in [model.matrices[name]]}
    loads: list[tuple[float, list[str]]] = [(0.0, []) for _ in range(gpus)]
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = min(range(gpus), key=lambda owner: loads[owner][0])
        loads[least] = loads[least][0] + costs[name], [*loads[least][1], name]
    return [names for _, names in loads]


def load(model: Llama, names: Sequence[str], solver: Solver, device: Device, times: int) -> float:
    """Seconds of one owner: each distinct input prepared, each matrix solved `times` over."""
    inputs = [c for c, group in model.groups if any(name in names for name in group)]
    solved = sum(solver.one(*model.matrices[name], device) for name in names)
    return sum(solver.prepare(c, device) for c in inputs) + times * solved


def critical(
    model: Llama, solver: Solver, stages: Sequence[Sequence[str]], gpus: int, device: Device, times: int = 1
) -> float:
    """Seconds of a block's solve phase: of each stage the owner who is last."""
    return sum(max(load(model, own, solver, device, times) for own in owned(model, stage, gpus)) for stage in stages)


def together(model: Llama) -> list[list[str]]:
    """One stream measures all matrices at once."""
    return [list(model.matrices)]


def apart(model: Llama) -> list[list[str]]:
    """Two streams measure one input after the other, each seeing what has been pruned before."""
    return [group for _, group in model.groups]


@dataclass(frozen=True)
class Phase:
    """Seconds of one block on so many GPUs, by what is waited for."""

    forward: float
    grams: float
    solve: float
    traffic: float
    disk: float

    @property
    def total(self) -> float:
        """Reading hides behind the rest where it is shorter."""
        return max(self.forward + self.grams + self.solve + self.traffic, self.disk)

    @property
    def bottleneck(self) -> str:
        parts = {"forward": self.forward, "Gram sums": self.grams, "solve": self.solve, "traffic": self.traffic}
        most = max(parts, key=lambda name: parts[name])
        return "disk" if self.disk >= sum(parts.values()) else most


def nodes(gpus: int) -> int:
    return -(-gpus // 8)


def bandwidth(gpus: int, device: Device) -> float:
    """Bytes/s of each GPU in a ring: its link, or its share of the node's network."""
    return device.link if gpus <= 8 else min(device.link, device.net / 8)


def reduced(size: float, gpus: int, device: Device) -> float:
    """Seconds to sum tensors of so many bytes onto one owner, or to send them to all, over a ring."""
    return size * (gpus - 1) / gpus / bandwidth(gpus, device)


def one_shot(model: Llama, two: bool, gpus: int, device: Device) -> Phase:
    """One block of SparseGPT on one stream, or of ADMM with corrected targets on two."""
    tokens = (TOKENS + HELD if two else TOKENS) // gpus
    products = grams(model, tokens) + (crosses(model, tokens) if two else 0.0)
    solver, stages = (ADMM, apart(model)) if two else (SPARSEGPT, together(model))
    sums = gram_bytes(model) * (SUMS_TWO if two else 1) + 2.0 * model.block
    return Phase(
        forward=seconds_dense((model.passes if two else 2.0) * forward(model, tokens), device),
        grams=seconds_dense(products, device),
        solve=critical(model, solver, stages, gpus, device),
        traffic=reduced(sums, gpus, device),
        disk=2.0 * model.block / DISK,
    )


def crosses(model: Llama, tokens: int) -> float:
    """Σ (y − x) xᵀ of each input, and Σ (g − h) xᵀ of the two matrices that write to the residual stream; a difference
    is the sum of two narrow ones, and so each is two products.
    """
    return 2 * 2.0 * tokens * (sum(c * c for c, _ in model.groups) + model.d * (model.d + model.f))


def gram_bytes(model: Llama) -> float:
    """Float32 Grams of one block, one for each distinct input."""
    return 4.0 * sum(c * c for c, _ in model.groups)


SUMS_TWO = 4
"""Gram and cross, to calibrate and to judge."""
SEARCHED = 2.5
"""Passes of fine-tuning in a first round: its own, and three halves to find a learning rate."""


def round_phases(model: Llama, gpus: int, device: Device) -> dict[str, float]:
    """Seconds of a first further round, blocks streamed: there and back are three forwards, the reverse walk takes one
    more; a Newton step solves every matrix for each step size.
    """
    forwards = model.layers * forward(model, TOKENS // gpus)
    scores = SIZES + 5
    visits = 2 * STEPS * SEARCHED + 3 + scores
    times = {
        "teacher": seconds_dense(forwards, device),
        "fine-tuning": seconds_dense(4 * SEARCHED * forwards, device),
        "its all-reduce": 2 * STEPS * SEARCHED * reduced(4.0 * model.layers * model.block, gpus, device),
        "gradients": seconds_dense(4 * forwards, device),
        "Grams": seconds_dense(model.layers * grams(model, TOKENS // gpus), device),
        "solve": model.layers * critical(model, ADMM, together(model), gpus, device, SIZES),
        "judging": seconds_dense(scores * model.layers * forward(model, HELD // gpus), device),
    }
    return times | {"disk": visits * 2.0 * model.layers * model.block / DISK}


# ------------------------------------------------------------------------------------------------ tables


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def power(value: float) -> str:
    """1.2e15 as people write it."""
    return f"{value:.1e}".replace("e+", "e")


def spoken(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def assumptions() -> str:
    rows = [
        [d.name, f"{d.dense / 1e12:.0f}", f"{d.quick / 1e12:.0f}", f"{d.single / 1e12:.4g}", f"{d.memory / 1e12:.2f}",
         f"{d.link / 1e9:.0f}", f"{d.net / 8e9:.0f}", f"{d.bytes / 1e9:.0f}"]
        for d in DEVICES
    ]  # fmt: skip
    head = [
        "GPU", "bf16, Tflop/s", "TF32, Tflop/s", "float32, Tflop/s", "memory, TB/s", "NVLink, GB/s",
        "InfiniBand a GPU, GB/s", "GB",
    ]  # fmt: skip
    return table(head, rows)


def work() -> str:
    """Flops of one block."""
    rows = []
    for m in MODELS:
        cs = {name: c for c, names in m.groups for name in names}
        rows.append(
            [
                m.name,
                f"{m.layers} x {m.block / 1e6:,.0f} M",
                power(forward(m, TOKENS)),
                power(grams(m, TOKENS)),
                power(sum(factorisation(c) for c, _ in m.groups)),
                power(sum(sweep(*shape) for shape in m.matrices.values())),
                power(sum(ladder(c) for c, _ in m.groups)),
                power(sum(search(*shape) + polish(*shape) for shape in m.matrices.values())),
                f"{search(*m.matrices['down']) / sum(search(*s) for s in m.matrices.values()):.0%}",
            ]
        )
        assert cs["down"] == m.f
    head = ["model", "blocks", "forward", "Gram sums", "factorise", "sweep", "ADMM ladder", "ADMM steps", "of it down"]
    return table(head, rows)


def memory() -> str:
    rows = [
        [
            m.name,
            size(2 * m.parameters),
            size(2 * m.block),
            size(2 * TOKENS * m.d),
            size(2 * 2 * (TOKENS + HELD) * m.d * 2),
            size(4 * m.d**2),
            size(4 * m.f**2),
            size(gram_bytes(m)),
            size(4 * (1 + 3) * m.f**2 + 4 * 5 * m.d * m.f),
            size(4 * (4 + 13) * m.f**2 + 4 * 9 * m.d * m.f),
            size((2 * (SIZES + 1) + 12) * m.layers * m.block),
        ]
        for m in MODELS
    ]
    head = [
        "model", "weights", "a block", "hidden states", "waiting, two streams", "Gram of d", "Gram of f",
        "all Grams of a block", "SparseGPT on down", "ADMM on down",
        "stores of a round",
    ]  # fmt: skip
    return table(head, rows)


def course(two: bool) -> str:
    device, rows = DEVICES[1], []
    for model in MODELS:
        for gpus in (1, 8, 64):
            one = one_shot(model, two, gpus, device)
            parts = (one.forward, one.grams, one.solve, one.traffic, one.disk, one.total)
            rows.append([model.name, str(gpus), *(spoken(model.layers * part) for part in parts), one.bottleneck])
    return table(["model", "GPUs", "forward", "Gram sums", "solve", "traffic", "disk", "all blocks", "most"], rows)


def owners() -> str:
    device, rows = DEVICES[1], []
    for model in MODELS[1:]:
        for name, solver, stages in (("SparseGPT", SPARSEGPT, together(model)), ("ADMM", ADMM, apart(model))):
            alone = critical(model, solver, stages, 1, device)
            down = load(model, ["down"], solver, device, 1)
            faster = [f"{alone / critical(model, solver, stages, gpus, device):.1f}" for gpus in (2, 4, 8, 64)]
            rows.append([model.name, name, spoken(alone), spoken(down), *faster])
    return table(["model", "solver", "one GPU", "down alone", "2 GPUs: times faster", "4", "8", "64"], rows)


def traffic() -> str:
    rows = []
    for m in MODELS[1:]:
        one = gram_bytes(m)
        rows.append(
            [m.name, size(one), size(SUMS_TWO * one), size(2.0 * m.block), size(4.0 * m.layers * m.block),
             size(2.0 * m.layers * m.block)]
        )  # fmt: skip
    head = [
        "model",
        "Grams of a block",
        "with crosses, two streams",
        "results of a block",
        "gradients, a step",
        "read from disk, a pass and node",
    ]
    return table(head, rows)


def rounds() -> str:
    device, rows = DEVICES[1], []
    for model in MODELS[1:]:
        for gpus in (8, 64):
            rows.append([model.name, str(gpus), *map(spoken, round_phases(model, gpus, device).values())])
    return table(["model", "GPUs", *round_phases(MODELS[1], 8, device)], rows)


TABLES = {
    "assumptions": assumptions,
    "work": work,
    "memory": memory,
    "SparseGPT": lambda: course(two=False),
    "ADMM": lambda: course(two=True),
    "owners": owners,
    "traffic": traffic,
    "rounds": rounds,
}


def main() -> None:
    for name, made in TABLES.items():
        print(f"{name}\n\n{made()}\n")


if __name__ == "__main__":
    main()
