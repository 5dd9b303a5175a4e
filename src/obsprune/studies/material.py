"""The data that studies run on: MNIST, MNIST-1D and MONK's, from a folder, or made by their published rules."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from obsprune.errors import InputError

MNIST = {"images": "t10k-images-idx3-ubyte.gz", "labels": "t10k-labels-idx1-ubyte.gz"}
IDX_BYTES = {3: 16, 1: 8}
"""Bytes before the values of an IDX file, by its number of dimensions."""
MONKS_VALUES = (3, 3, 2, 3, 4, 2)
"""How many values each of the six attributes of the MONK's problems has: 432 cases in all."""


@dataclass(frozen=True)
class Labelled:
    """Inputs and classes of a training and a test part, and where they come from."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    told: str


@dataclass(frozen=True)
class Material:
    """A folder with mnist/, mnist1d/ and monks/ in it, or none. work: where a long experiment keeps what it has done
    until it is finished; without it nothing is kept.
    """

    folder: Path | None = None
    work: Path | None = None

    @contextmanager
    def working(self) -> Iterator[Path]:
        """A folder to work in, which is there again when a stopped experiment is repeated, and gone when it is done."""
        folder = self.work or Path(tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        except BaseException:
            if self.work is None:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)

    def path(self, name: str) -> Path | None:
        """A file of the folder, where there is one."""
        path = self.folder / name if self.folder else None
        return path if path and path.is_file() else None

    def require(self, name: str, what: str) -> Path:
        """A file that cannot be done without. Raises InputError."""
        return self._found(self.path(name), name, what)

    def require_any(self, name: str, what: str) -> Path:
        """A file or a folder that cannot be done without. Raises InputError."""
        path = self.folder / name if self.folder else None
        return self._found(path if path and path.exists() else None, name, what)

    def _found(self, path: Path | None, name: str, what: str) -> Path:
        if path is None:
            where = f"{self.folder} has no {name}" if self.folder else "no folder of data was named"
            raise InputError(f"{what} is needed and {where}; --data DIR, where DIR/{name} is")
        return path

    def mnist_test(self) -> tuple[Tensor, Tensor]:
        """The 10,000 test images, float32 [N, 28, 28] from 0 to 255, and their digits [N]. Raises InputError."""
        images = _idx(self.require(f"mnist/{MNIST['images']}", "MNIST's test set"), 3)
        return images.view(-1, 28, 28).float(), _idx(
            self.require(f"mnist/{MNIST['labels']}", "MNIST's test set"), 1
        ).long()

    def mnist1d(self) -> Labelled:
        """The frozen MNIST-1D of its authors: 4,000 and 1,000 signals of 40 values. Raises InputError."""
        data = _arrays(self.require("mnist1d/mnist1d_data.pkl", "MNIST-1D"))
        x, x_test = (torch.tensor(data[key]).float() for key in ("x", "x_test"))
        y, y_test = (torch.tensor(data[key]).long() for key in ("y", "y_test"))
        return Labelled(x, y, x_test, y_test, "MNIST-1D, the authors' frozen set: 4,000 to train on, 1,000 to test")

    def monk1(self) -> Labelled:
        """The first of the MONK's problems: six attributes from 1 up [N, 6], classes 0 and 1 [N]; 124 cases, and all
        432 to test. Raises InputError.
        """
        train, test = (_monks(self.require(f"monks/monks-1.{part}", "MONK-1")) for part in ("train", "test"))
        told = f"MONK-1 as published: {len(train)} cases to train on, {len(test)} to test"
        return Labelled(train[:, 1:], train[:, 0], test[:, 1:], test[:, 0], told)


def _idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file's bytes. Raises InputError when it is damaged."""
    try:
        return torch.frombuffer(
            bytearray(gzip.decompress(path.read_bytes())[IDX_BYTES[dimensions] :]), dtype=torch.uint8
        )
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} is no gzipped IDX file ({error}); download it again") from error


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays and nothing else: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.replace("numpy._core", "numpy.core") in ("numpy.core.multiarray", "numpy") and name in (
            "_reconstruct",
            "ndarray",
            "dtype",
            "scalar",
        ):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise InputError(f"a pickle that asks for {module}.{name} is not a set of arrays")


def _arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A pickled mapping of arrays. Raises InputError."""
    try:
        return dict(_ArraysOnly(io.BytesIO(path.read_bytes())).load())
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no pickle of arrays ({error}); download it again") from error


def _monks(path: Path) -> Tensor:
    """Class and six attributes of every case [N, 7]; a line is those and a name, the first may be a header.

    Raises InputError when the file is damaged.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        table = torch.tensor([[int(value) for value in line[:7]] for line in lines if line and line[0] != "class"])
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of a MONK's problem ({error}); download it again") from error
    values = torch.tensor((1, *MONKS_VALUES))
    lowest = (values > 1).long()  # a class may be 0, attributes start at 1
    if table.ndim != 2 or table.shape[1] != 7 or bool(((table < lowest) | (table > values)).any()):
        raise InputError(f"{path} has lines that are not a class and six attributes; download it again")
    return table
