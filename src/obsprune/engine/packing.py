"""A checkpoint into its compact form and back: the files of a directory one after another, config.json last."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from obsprune import __version__
from obsprune.engine.kept import require_outside
from obsprune.engine.rundir import JOURNAL
from obsprune.errors import InputError, first_line
from obsprune.models.caution import is_dir, is_file, refuse_links
from obsprune.models.checkpoint import CONFIG, MADE, PACKED_INDEX, Checkpoint, write_atomic, write_text
from obsprune.models.files import FILE_KINDS, SAFETENSORS
from obsprune.models.packed import (
    PackedCheckpoint,
    pack_file,
    packed_config,
    packed_names,
    unpack_file,
    write_packed_index,
)
from obsprune.progress import Progress

MARKER = ".obsprune-unfinished"
"""There as long as a directory is being filled: what is in it may be deleted."""
WEIGHTS = (*(pattern for kind in FILE_KINDS for pattern in (*kind.patterns, kind.index)), PACKED_INDEX)


def pack(source: Path, output: Path, progress: Progress, force: bool = False) -> dict[str, Any]:
    """Writes a checkpoint in less room, without loss. Returns where, and the bytes of its weights before and after.

    Raises InputError before anything is written when `source` is no checkpoint of safetensors files, or `output` holds
    something (with `force`: something that obsprune has not made); OutputError.
    """
    begin = time.perf_counter()
    checkpoint, texts = _dense(source)
    dense = [path.name for path in checkpoint.paths()]
    with begun([source], output, force):
        names = _pack(checkpoint, source, output, progress)
        _copy_others(source, output, {*dense, SAFETENSORS.index}, progress)
        _complete(output, names, texts)
    return _told(output, len(checkpoint.headers), _bytes(source, dense), _bytes(output, names), begin)


def pack_beside(directory: Path, progress: Progress) -> dict[str, Any]:
    """As `pack`, beside the dense files of a directory, which can be loaded at every moment; it may be begun again when
    it was stopped. The packed files are read back, so that `drop_dense` may follow.
    """
    begin = time.perf_counter()
    checkpoint, texts = _dense(directory)
    names = _pack(checkpoint, directory, directory, progress)
    _complete(directory, names, texts)
    for file in PackedCheckpoint.open(directory).files:
        for stored in file.tensors:
            file.read(stored)
    dense, packed = _bytes(directory, names.values()), _bytes(directory, names)
    return _told(directory, len(checkpoint.headers), dense, packed, begin)


def drop_dense(directory: Path) -> None:
    """Deletes what the packed files of a directory were made of, the index first: what is left is never taken for a
    checkpoint. It may be begun again when it was stopped.
    """
    for name in (SAFETENSORS.index, *PackedCheckpoint.open(directory).names.values()):
        (directory / name).unlink(missing_ok=True)


def unpack(source: Path, output: Path, progress: Progress, force: bool = False) -> dict[str, Any]:
    """Writes the checkpoint that a packed one was made of: the same files, byte by byte, and MADE. Returns what `pack`
    does.

    Raises InputError as `pack`, and for whatever is damaged, by its name; OutputError.
    """
    begin = time.perf_counter()
    _require_directory(source)
    if not PackedCheckpoint.found(source):
        raise InputError(f"{source} is not packed: it has no {PACKED_INDEX}")
    refuse_links(source, ("*",))
    packed = PackedCheckpoint.open(source)
    with begun([source], output, force):
        progress.stage("unpacking", len(packed.tensors))
        for file in packed.files:
            unpack_file(file, output / packed.names[file.path.name], progress)
        _copy_others(source, output, {*packed.names, PACKED_INDEX}, progress)
        for name in sorted(packed.texts, key=lambda name: name == CONFIG):
            write_text(output / name, packed.texts[name])
        sign(output, "unpack")
    dense, small = _bytes(output, packed.names.values()), _bytes(source, packed.names)
    return _told(output, len(packed.tensors), dense, small, begin)


def sign(output: Path, command: str) -> None:
    """Says in a result that obsprune has made it, so that --force may replace it."""
    write_text(output / MADE, json.dumps({"made_by": f"obsprune {__version__}", "command": command}) + "\n")


def _dense(directory: Path) -> tuple[Checkpoint, dict[str, str]]:
    """A checkpoint that can be packed, and the texts that are replaced. Raises InputError for every other one."""
    _require_directory(directory)
    if PackedCheckpoint.found(directory) and not SAFETENSORS.found(directory):
        raise InputError(f"{directory} is packed already; 'obsprune unpack' is the way back")
    if not SAFETENSORS.found(directory):
        raise InputError(
            f"{directory} holds no {SAFETENSORS.single} and no {SAFETENSORS.index}: results of obsprune do, and other "
            "checkpoints once save_pretrained has written them"
        )
    if not is_file(directory / CONFIG):
        raise InputError(f"{directory} is not a whole checkpoint: it has no {CONFIG}")
    refuse_links(directory, ("*",))
    checkpoint = Checkpoint.open(directory)
    try:
        replaced = [name for name in (CONFIG, SAFETENSORS.index) if is_file(directory / name)]
        texts = {name: (directory / name).read_bytes().decode() for name in replaced}
        packed_config(texts[CONFIG])
    except ValueError as error:
        raise InputError(f"{directory / CONFIG} is damaged ({first_line(error)}); download it again") from error
    return checkpoint, texts


def _pack(checkpoint: Checkpoint, source: Path, output: Path, progress: Progress) -> dict[str, str]:
    """Packs all files of weights; {packed file: the one it was made of}."""
    names = packed_names(path.name for path in checkpoint.paths())
    progress.stage("packing", len(checkpoint.headers))
    for packed, dense in names.items():
        pack_file(source / dense, output / packed, progress)
    return names


def _complete(output: Path, names: dict[str, str], texts: dict[str, str]) -> None:
    write_packed_index(output, names, texts)
    write_text(output / CONFIG, packed_config(texts[CONFIG]))


def _copy_others(source: Path, output: Path, own: Collection[str], progress: Progress) -> None:
    """Everything beside weights, config and MADE, but for hidden files; what is left out is told."""
    for path in sorted(source.iterdir()):
        if path.name in (CONFIG, MADE) or path.name.startswith("."):
            continue
        if any(path.match(pattern) for pattern in WEIGHTS):
            if path.name not in own:
                progress.notice(f"{path.name} is left out: it is no part of the checkpoint")
        elif path.is_dir():
            progress.notice(f"{path.name}/ is left out: directories are not copied")
        else:
            write_atomic(output / path.name, partial(_copied, path))


def _copied(path: Path, temporary: Path) -> None:
    shutil.copyfile(path, temporary)


@contextmanager
def begun(sources: Sequence[Path], output: Path, force: bool) -> Iterator[None]:
    """While open, `output` is being filled, and nobody takes it for a checkpoint; after an error it is as if never
    begun: a former result waits beside it until this one is whole. sources: what is read. Raises InputError when there
    is something in `output` that may not be deleted.
    """
    former = output.with_name(f".{output.name}.former")
    for place in (output, former):
        require_outside(place, sources)
    _require_free(output, force)
    try:
        if output.is_dir() and not is_file(output / MARKER) and any(output.iterdir()):
            _delete(former)  # left by a kill just before its end
            output.replace(former)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / MARKER, "".join(f"{source}\n" for source in sources))
        _empty(output)
    except OSError as error:
        raise InputError(f"cannot create {output}: {error.strerror}; choose another -o") from error
    try:
        yield
    except BaseException:
        _empty(output)
        (output / MARKER).unlink()
        with suppress(OSError):  # a mount point or a link stays, empty
            output.rmdir()
            if former.is_dir():
                former.replace(output)
        raise
    (output / MARKER).unlink()
    _delete(former)


def _delete(former: Path) -> None:
    if former.is_symlink():  # as the output was one
        former.unlink()
    shutil.rmtree(former, ignore_errors=True)


def _require_free(output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; choose another -o")
    if not output.is_dir() or not any(output.iterdir()) or is_file(output / MARKER):
        return
    if not any(is_file(output / name) for name in (PACKED_INDEX, JOURNAL, MADE)):
        raise InputError(f"{output} is not empty and was not made by obsprune; choose another -o, or empty it yourself")
    if not force:
        raise InputError(f"{output} holds a former result; use --force or another -o")


def _require_directory(path: Path) -> None:
    if not is_dir(path):
        raise InputError(f"there is no directory {path}")


def _empty(directory: Path) -> None:
    """Deletes everything inside but the marker."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()


def _bytes(directory: Path, names: Iterable[str]) -> int:
    return sum((directory / name).stat().st_size for name in names)


def _told(output: Path, tensors: int, dense: int, packed: int, begin: float) -> dict[str, Any]:
    seconds = time.perf_counter() - begin
    return {
        "output": str(output),
        "tensors": tensors,
        "dense_bytes": dense,
        "packed_bytes": packed,
        "share": packed / dense,
        "seconds": seconds,
    }
