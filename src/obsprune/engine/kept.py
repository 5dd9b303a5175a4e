"""What a run reads from this disk: none of it may lie where the run deletes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from obsprune.errors import InputError
from obsprune.models.caution import is_dir, is_file

Names = Iterable[str | None]
"""Of models, data sets and tasks: on the hub, or PATH, text=PATH, FILE.safetensors:TENSOR."""


def local(names: Names) -> Iterator[Path]:
    """What of all that is named is there on this disk."""
    for name in filter(None, names):
        texts = [name, name.partition("=")[2]]
        for text in filter(None, [*texts, *(text.rpartition(":")[0] for text in texts)]):
            path = Path(text).expanduser()
            if is_file(path) or is_dir(path):
                yield path


def require_outside(output: Path, paths: Iterable[Path]) -> None:
    """Raises InputError when `output`, which may be emptied, is or holds one of these paths, or a link to it."""
    home = output.resolve()
    for path in paths:
        link = path.parent.resolve() / path.name
        if path.resolve().is_relative_to(home) or link.is_relative_to(home):
            raise InputError(f"{output} is, or holds, {path}, which is read; choose another -o")
