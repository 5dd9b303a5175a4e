"""The questions of MMLU from a folder, in the layouts they are passed on in."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from obsprune.errors import InputError, first_line, nearest

SPLITS = ("dev", "test")
COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
ANSWERS = {sign: place for place in range(4) for sign in (place, str(place), "ABCD"[place])}
LAYOUTS = "{dev,test}/SUBJECT_{dev,test}.csv or SUBJECT/{dev,test}-*.parquet"
NO_SUBJECTS = {"all", "auxiliary_train"}
"""Folders beside the subjects in the hub's repository."""


class Documents(list[dict[str, Any]]):
    """One split, as lm_eval asks for it: documents, and the names of their fields."""

    features = dict.fromkeys(("question", "subject", "choices", "answer"))


def read_mmlu(path: Path, subjects: Collection[str], shots: int = 0) -> dict[str, dict[str, Documents]]:
    """{subject: {dev, test: documents}} of a folder that holds all or some of the subjects.

    Layouts: CSV as released, with or without a header, and the hub's cais/mmlu. Raises InputError with file and row.
    """
    files = _mmlu_files(path)
    if not files:
        raise InputError(f"{path} is no folder with MMLU ({LAYOUTS}); get it from huggingface.co/datasets/cais/mmlu")
    material: dict[str, dict[str, Documents]] = {}
    for subject, split, file in files:
        if subject not in subjects:
            raise InputError(f"{file}: MMLU has no subject '{subject}'; {nearest(subject, subjects)}")
        read = _csv_rows if file.suffix == ".csv" else _parquet_rows
        documents = material.setdefault(subject, {}).setdefault(split, Documents())
        documents += [_document(fields, subject, f"{file}, row {row}") for row, fields in read(file)]
        if not documents:
            raise InputError(f"{file} holds no question; get it again, or take the subject out of {path}")
    for subject, splits in material.items():
        _check_splits(path, subject, splits, shots)
    return material


def _check_splits(path: Path, subject: str, splits: dict[str, Documents], shots: int) -> None:
    for missing in set(SPLITS) - set(splits):
        raise InputError(f"{path} has no {missing} split of {subject}; add it ({LAYOUTS}), or take the subject out")
    if len(splits["dev"]) < shots:
        raise InputError(
            f"{path}: {shots} few-shot examples are asked for and the dev split of {subject} has {len(splits['dev'])}; "
            "ask for fewer (--num-fewshot)"
        )


def _mmlu_files(path: Path) -> list[tuple[str, str, Path]]:
    """(subject, split, file) in the first layout, else in the second."""
    csvs = [(f.stem.removesuffix(f"_{s}"), s, f) for s in SPLITS for f in sorted(path.glob(f"{s}/*_{s}.csv"))]
    hub = [(f.parent.name, s, f) for s in SPLITS for f in sorted(path.glob(f"*/{s}-*.parquet"))]
    return csvs or [found for found in hub if found[0] not in NO_SUBJECTS]


def _csv_rows(file: Path) -> Iterator[tuple[int, list[Any]]]:
    """(row in the file, fields) without the header, if there is one."""
    row = 0
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            for row, fields in enumerate(csv.reader(stream, strict=True), 1):
                if row > 1 or tuple(fields) != COLUMNS:
                    yield row, fields
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file} cannot be read as CSV after row {row}: {error}; get it again") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, list[Any]]]:
    """(row in the file, fields) of the hub's table."""
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(file).select(["question", "choices", "answer"])
    except (ArrowException, KeyError, OSError) as error:
        raise InputError(
            f"{file} is no table of question, choices, answer ({first_line(error)}); get it again"
        ) from error
    for row, (question, choices, answer) in enumerate(zip(*table.to_pydict().values(), strict=True), 1):
        yield row, [question, *(choices or ()), answer]


def _document(fields: list[Any], subject: str, where: str) -> dict[str, Any]:
    """One question as the hub has it. `where`: file and row, for the error."""
    if len(fields) != len(COLUMNS) or not all(isinstance(field, str) for field in fields[:-1]):
        raise InputError(f"{where}: {len(fields)} fields; a question, four choices and the answer are needed")
    question, *choices, answer = fields
    if not question.strip():
        raise InputError(f"{where}: the question is empty")
    if answer not in ANSWERS:
        raise InputError(f"{where}: the answer '{answer}' is none of 0, 1, 2, 3 or A, B, C, D")
    return {"question": question, "subject": subject, "choices": choices, "answer": ANSWERS[answer]}
