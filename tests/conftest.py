from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when datasets is imported, by whichever test does it first
pytest_plugins = ["zoo", "fake_hub"]  # their fixtures `zoo`, `tokens` and `fake_hub` are everybody's


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums are split by the number of threads; one thread makes every test's bytes the same everywhere."""
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What libraries print of damaged names may hold lone surrogates, which xdist cannot send to its parent."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def _folder(variable: str, holds: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set (a folder with {holds})")
    return Path(path)


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Results of other implementations on real layers."""
    return _folder("OBSPRUNE_ORACLES", "reference results on real layers")


@pytest.fixture(scope="session")
def assets() -> Path:
    """Small real models and data sets."""
    return _folder("OBSPRUNE_ASSETS", "small real models and data sets")
