"""Where the kernels run: in Triton's interpreter, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when it is imported, for good, so the interpreter has a process of its own.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

PATIENCE = 300.0

Run = Callable[..., Any]
"""A function of a module, and its arguments -> what it gives."""


@contextmanager
def process(**environment: str) -> Iterator[Run]:
    """Another Python with these variables set from its start."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; there are wheels for Linux only")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(torch.set_num_threads, 1).result(PATIENCE)
        yield lambda function, *args: pool.submit(function, *args).result(PATIENCE)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Run]:
    with process(TRITON_INTERPRET="1") as run:
        yield run


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Where Triton compiles, for whatever GPU is named."""
    with process(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))) as run:
        yield run


@pytest.fixture(scope="session", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a function of tensors on a device, and brings its answer to the CPU."""
    if request.param == "interpreter":
        return request.getfixturevalue("interpreter")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return on_gpu


def on_gpu(function: Callable[..., tuple[torch.Tensor, ...]], *args: Any) -> tuple[torch.Tensor, ...]:
    there = [arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in args]
    return tuple(x.cpu() for x in function(*there))
