"""The story of bench-inference: a sparse checkpoint in every form there is for it here, timed beside the dense one."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import psutil
import torch

from obsprune.errors import InputError
from obsprune.evaluate.latency import AS_FAST, Bench, Times
from obsprune.evaluate.workloads import WORKLOADS, Clock
from obsprune.models.forms import CSR_FROM, Csr, Form, Formed, SemiStructured, weight_bytes
from obsprune.models.matrices import linears
from obsprune.models.ready import Ready, make_ready
from obsprune.progress import Progress

DENSE, AS_IT_IS = "dense", "as it is"
"""The dense model, and the sparse checkpoint with its zeros as numbers among others."""
WHY = (
    "Zeros in a dense tensor are multiplied like all other numbers: a sparse checkpoint is as fast as the dense one "
    "unless a kernel leaves them out, CSR on a CPU from about 80 % zeros, 2:4 on a GPU with sparse tensor cores "
    "(docs/inference.md). `obsprune pack` makes the file smaller."
)


@final
@dataclass(frozen=True)
class Asked:
    """What is measured. prompt: tokens, None: 128 or what the model has room for; new: tokens decoded after it;
    repeats: of each form, by turns, after `warmup` that are not counted; clock: None is the machine's own.
    """

    batch_sizes: Sequence[int] = (1, 16)
    prompt: int | None = None
    new: int = 32
    repeats: int = 10
    warmup: int = 2
    csr_from: float = CSR_FROM
    clock: Clock | None = None

    @property
    def forms(self) -> tuple[Form, ...]:
        return Csr(self.csr_from), SemiStructured()


def bench_inference(
    name: str, progress: Progress, dense: str | None = None, asked: Asked | None = None, **how: Any
) -> dict[str, Any]:
    """Latencies of a checkpoint in its forms, with their spread and what may be said of them. dense: the model it was
    made of, as the baseline; without it, that is the checkpoint as it is. how: device, dtype, revision, token,
    trust_remote_code.

    Raises InputError for what cannot be loaded or measured, and when a form gives wrong outputs.
    """
    wish = asked or Asked()
    ready = make_ready(name, **how)
    bench = Bench(
        WORKLOADS[ready.kind.reads](ready, wish.prompt, wish.new),
        wish.clock or partial(now, ready.device),
        wish.warmup,
        wish.repeats,
    )
    like = how | {"dtype": str(ready.dtype).removeprefix("torch.")}
    other = {DENSE: Formed(_same_shapes(ready, make_ready(dense, **like)).network)} if dense else {}
    formed, absent = form_all(ready, wish.forms)
    runners = {**other, AS_IT_IS: Formed(ready.network), **formed}
    rows: list[dict[str, Any]] = []
    for batch in wish.batch_sizes:
        bench.require_alike(ready.network, _networks(formed), batch)
        rows += _rows(batch, bench.measure(_networks(runners), batch, progress))
    return {
        "model": name,
        "dense": dense,
        "baseline": next(iter(runners)),
        "work": bench.workload.said,
        "dtype": str(ready.dtype).removeprefix("torch."),
        "repeats": wish.repeats,
        "warmup": wish.warmup,
        "machine": machine(ready.device),
        "linears": len(linears(ready.network)),
        "forms": {form: {"bytes": weight_bytes(one.network), "layers": one.layers} for form, one in runners.items()},
        "absent": absent,
        "rows": rows,
        "conclusion": conclusion(rows),
    }


def form_all(ready: Ready, forms: Sequence[Form]) -> tuple[dict[str, Formed], dict[str, str]]:
    """The network in those forms that there are for it here, and {form: why not} for the others."""
    formed: dict[str, Formed] = {}
    absent: dict[str, str] = {}
    for form in forms:
        try:
            formed[form.name] = form.of(ready.network)
        except InputError as error:
            absent[form.name] = str(error)
    return formed, absent


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> dict[str, Any]:
    """What is measured on. load: how many processes wanted a core in the last minute: where they are more than there
    are cores, times are those of a busy machine.
    """
    cpu = f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "cores": psutil.cpu_count(),
        "load": round(psutil.getloadavg()[0], 1),
        "torch": torch.__version__,
    }


def conclusion(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is faster, and why the rest is not."""
    faster = [row for row in rows if row["verdict"].endswith(AS_FAST) and row["form"] != AS_IT_IS]  # which is chance
    told = "; ".join(f"{row['form']}, {row['phase']} at batch {row['batch']}: {row['verdict']}" for row in faster)
    return f"{f'Faster here: {told}' if faster else 'No faster here'}. {WHY}"


def _same_shapes(ready: Ready, other: Ready) -> Ready:
    """The other model. Raises InputError when its weights are not of the same names and shapes."""
    own, its = ({name: x.shape for name, x in one.network.state_dict().items()} for one in (ready, other))
    differing = next((name for name in [*own, *its] if own.get(name) != its.get(name)), None)
    if differing:
        raise InputError(
            f"{other.name} is another network than {ready.name}: {differing} is {_shape(its.get(differing))} there and "
            f"{_shape(own.get(differing))} here; --dense wants the model that this one was made of"
        )
    return other


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"


def _networks(runners: Mapping[str, Formed]) -> dict[str, Any]:
    return {name: one.network for name, one in runners.items()}


def _rows(batch: int, found: Mapping[str, Mapping[str, Times]]) -> list[dict[str, Any]]:
    """One for each phase and form; the first form is what the others are held against."""
    return [
        {
            "batch": batch,
            "phase": phase,
            "form": form,
            "seconds": taken.tree(),
            "ratio": taken.ratio(base),
            "verdict": "baseline" if taken is base else taken.against(base),
        }
        for phase, times in found.items()
        for base in [next(iter(times.values()))]
        for form, taken in times.items()
    ]
