"""Where kernels run is found by running one, and where they do not a warning says why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from obsprune import kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KERNEL = "obsprune.kernels.column_sweep"
anew = kernels.available.__wrapped__
"""Not what was found before in this process."""


def test_the_interpreter_takes_tiles_up_to_128_columns(interpreter: Callable[..., Any]) -> None:
    assert interpreter(kernels.available, CPU)
    assert [interpreter(kernels.take, torch.zeros(columns, 1)) for columns in (1, 128, 129)] == [True, True, False]


def test_a_cpu_has_plain_torch_and_needs_no_warning(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not anew(CPU)
    assert not recwarn.list


def test_triton_is_imported_where_it_runs_and_nowhere_else() -> None:
    code = "import sys, torch, obsprune.solvers, obsprune.kernels as k; k.take(torch.zeros(1, 1)); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "obsprune.kernels" in loaded
    assert "triton" not in loaded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    assert anew(GPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a CUDA device that does not answer")
def test_a_gpu_that_fails_is_told() -> None:
    with pytest.warns(UserWarning, match=r"cannot run on cuda.*plain torch"):
        assert not anew(GPU)


def test_without_triton_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    monkeypatch.delattr(kernels, "column_sweep", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="ModuleNotFoundError: .*triton"):
        assert not anew(CPU)


def test_a_wrong_answer_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, KERNEL, SimpleNamespace(sweep=lambda *tile: None))
    with pytest.warns(UserWarning, match=r"they give \[4.0, 3.0\]"):
        assert not anew(CPU)
