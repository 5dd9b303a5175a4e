"""Where the images of a source lie and of what class each is: folders, labels files, saved data sets, the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from obsprune.errors import InputError, first_line
from obsprune.models.caution import is_dir, is_file
from obsprune.models.labels import SEPARATORS as LABELS_FILES
from obsprune.models.labels import Found, Labels, UnknownClass, read_labels
from obsprune.models.pixels import Cells, Files, Pictures

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2")
SAVED = ("state.json", "dataset_dict.json")
"""Files that only a folder written by `save_to_disk` has."""
HELDOUT = ("validation", "val", "valid", "test", "dev")
SPLITS = {"train": ("train", "training"), **{name: (name, *HELDOUT) for name in HELDOUT}}
"""A split, and the names it may have, best first."""
WAY_OUT = "give a labels file with a path and a class on each line"


@dataclass(frozen=True)
class Layout:
    """Images as they were found, with the model's index for the class of each, None where it is unknown; rule: how the
    classes were found, or why they were not; split: which one, of a source that has some.
    """

    pictures: Pictures
    classes: Sequence[int | None] = field(repr=False)
    rule: str
    split: str | None = None


def find_layout(source: str, labels: Labels, split: str) -> Layout:
    """See `images.open_images`. Raises InputError for what is no source of images, and for one without any."""
    layout = _find(source, labels, split)
    if not len(layout.pictures):
        raise InputError(f"{source} is empty: it holds no images")
    return layout


def _find(source: str, labels: Labels, split: str) -> Layout:
    path = Path(source).expanduser()
    if is_dir(path):
        saved = any((path / name).is_file() for name in SAVED)
        return _saved(path, labels, split) if saved else _folder(path, labels, split)
    if is_file(path):
        return _labels_file(path, labels)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or path.suffix.lower() in LABELS_FILES:
        raise InputError(f"there is no file or folder {source}")
    return _hub(source, labels, split)


def _labels_file(path: Path, labels: Labels) -> Layout:
    if path.suffix.lower() in SUFFIXES:
        raise InputError(f"{path} is one image; give a folder of images, or a labels file ({', '.join(LABELS_FILES)})")
    if path.suffix.lower() not in LABELS_FILES:
        raise InputError(f"{path} is neither a folder of images nor a labels file ({', '.join(LABELS_FILES)})")
    rows, found = read_labels(path, labels)
    classes = [found.indices[row.value] for row in rows]
    return Layout(Files(path.parent, [row.path for row in rows]), classes, found.rule)


def _folder(folder: Path, labels: Labels, split: str) -> Layout:
    """Images lie flat, or in folders by class, or in one of both for each split."""
    paths = _image_paths(folder)
    flat = [path for path in paths if "/" not in path]
    tops = list(dict.fromkeys(path.partition("/")[0] for path in paths))
    if not paths:
        raise InputError(f"{folder} holds no images ({' '.join(SUFFIXES)})")
    if flat and len(flat) < len(paths):
        raise InputError(
            f"{folder} holds {len(flat):,} images beside folders that hold {len(paths) - len(flat):,}; "
            "give one of the folders, or a labels file"
        )
    if flat:
        return _unlabelled(Files(folder, paths), f"a flat folder tells no classes; {WAY_OUT}")
    if all(top in (*SPLITS["train"], *HELDOUT) for top in tops):
        name = _choose(str(folder), tops, split)
        return replace(_folder(folder / name, labels, split), split=name)
    values = [path.partition("/")[0] for path in paths]
    return _labelled(Files(folder, paths), values, labels.resolve)


def _image_paths(folder: Path) -> list[str]:
    """The images below a folder by their paths from it, sorted folder by folder; hidden ones are left out."""
    paths = [
        Path(where, name).relative_to(folder)
        for where, _, names in os.walk(folder, onerror=_refuse, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    ]
    return [path.as_posix() for path in sorted(paths) if not any(part.startswith(".") for part in path.parts)]


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _choose(source: str, names: Sequence[str], split: str) -> str:
    """The name that a split has in this source. Raises InputError when it has several splits and none of that name."""
    known = [name for name in SPLITS.get(split, (split,)) if name in names]
    if not known and len(names) > 1:
        raise InputError(f"{source} has no split '{split}', it has {', '.join(names)}; give one of these by its path")
    return known[0] if known else names[0]


def _labelled(pictures: Pictures, values: Sequence[str], resolve: Callable[[Sequence[str]], Found]) -> Layout:
    """With classes where the model knows them all, else with none."""
    try:
        found = resolve(values)
    except UnknownClass as error:
        return _unlabelled(pictures, str(error))
    return Layout(pictures, [found.indices[value] for value in values], found.rule)


def _unlabelled(pictures: Pictures, why: str) -> Layout:
    return Layout(pictures, [None] * len(pictures), why)


# ------------------------------------------------------------------------------------------------ the library datasets


def _saved(folder: Path, labels: Labels, split: str) -> Layout:
    from datasets import load_from_disk

    try:
        tables = load_from_disk(str(folder))
    except Exception as error:  # a damaged folder: pyarrow, json and the library itself have no common error
        raise InputError(f"{folder} cannot be read as a saved data set: {first_line(error)}") from error
    return _tables(str(folder), tables, labels, split)


def _hub(source: str, labels: Labels, split: str) -> Layout:
    from datasets import load_dataset

    try:
        tables = load_dataset(source)
    except Exception as error:  # no network, no cache, no such id, a missing configuration: no common error
        raise InputError(
            f"'{source}' is no local file or folder and no data set that can be loaded ({first_line(error)}); "
            "give a folder of images or a labels file"
        ) from error
    return _tables(source, tables, labels, split)


def _tables(source: str, tables: Any, labels: Labels, split: str) -> Layout:
    """The images and classes of a table, or of one of several that are the splits."""
    if isinstance(tables, dict):
        name = _choose(source, list(tables), split)
        return replace(_table(source, tables[name], labels), split=name)
    return _table(source, tables, labels)


def _table(source: str, table: Any, labels: Labels) -> Layout:
    from datasets import Image

    column = _column(table, Image, ("image",))
    if column is None or not isinstance(table.features[column], Image):
        raise InputError(
            f"{source} has no column of images, or several and none is called image; "
            f"its columns are {', '.join(table.column_names)}"
        )
    pictures = Cells(table.select_columns([column]).cast_column(column, Image(decode=False)), column)
    return _table_classes(source, table, pictures, labels)


def _table_classes(source: str, table: Any, pictures: Cells, labels: Labels) -> Layout:
    from datasets import ClassLabel

    column = _column(table, ClassLabel, ("label", "labels"))
    if column is None:
        return _unlabelled(pictures, f"{source} has no column of classes called label; {WAY_OUT}")
    values = list(table[column])
    feature = table.features[column]
    if not isinstance(feature, ClassLabel):
        return _labelled(pictures, list(map(str, values)), labels.resolve)
    names = [feature.names[value] if value in range(len(feature.names)) else None for value in values]
    told = [name for name in names if name is not None]
    if len(told) < len(values):  # the hub's test splits say -1
        return _unlabelled(pictures, f"{source} tells {len(told):,} of {len(values):,} classes; {WAY_OUT}")
    return _labelled(pictures, told, lambda _: labels.resolve_ordered(feature.names))


def _column(table: Any, kind: type, preferred: Sequence[str]) -> str | None:
    """The only column of this kind; of several, or of none, the one with a preferred name."""
    columns = [str(name) for name, feature in table.features.items() if isinstance(feature, kind)]
    named = [name for name in preferred if name in (columns or table.column_names)]
    return columns[0] if len(columns) == 1 else named[0] if named else None
