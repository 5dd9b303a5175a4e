"""Inputs of every kind, whole and then damaged at random, given to the command line: what becomes of them.

scripts/damage.py prints the table; tests/test_hostile.py holds what must be true of every case.
"""

from __future__ import annotations

import copy
import csv
import json
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner, Result
from zoo import PICTURED, ZOO, Zoo, pictures_in, random_model, tokens_in

from obsprune.cli import app

Draw = Callable[[st.SearchStrategy[Any]], Any]
JUNK: list[Any] = [
    None, True, False, 0, 1, 7, -1, 0.5, 2**31, 2**63, 2**70, -(2**63), 1e308, float("nan"), float("inf"),
    "", "x", "0", "none", "../x", "/etc/passwd", "\x1b[31m", "\ud800", "a" * 5000, [], {}, [1], ["x"], {"a": 1},
]  # fmt: skip
"""What stands in the place of a value."""


# ------------------------------------------------------------------------------------------------ damage


@st.composite
def bytes_of(draw: Draw, whole: bytes) -> bytes:
    """A file cut short, with some bits turned, or with a part that is gone, doubled, or another's."""
    place, length = draw(st.integers(0, len(whole))), draw(st.integers(1, 64))
    where = draw(st.sampled_from([place, min(place, 200)]))  # what is at the front decides most
    match draw(st.sampled_from(["cut", "turned", "gone", "twice", "other", "more"])):
        case "cut":
            return whole[:where]
        case "turned":
            mask = draw(st.integers(1, 255))
            return whole[:where] + bytes(byte ^ mask for byte in whole[where : where + 1]) + whole[where + 1 :]
        case "gone":
            return whole[:where] + whole[where + length :]
        case "twice":
            return whole[: where + length] + whole[where:]
        case "other":
            other = draw(st.binary(min_size=length, max_size=length))
            return whole[:where] + other + whole[where + length :]
        case _:
            return whole + draw(st.binary(min_size=length, max_size=length))


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a tree."""
    keys: Any = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(tree[key], (*path, key))


@st.composite
def tree_of(draw: Draw, whole: Any) -> Any:
    """A tree of plain values in which one to three are others, gone, or under another name."""
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(tree))
        if not known:
            break
        *path, last = draw(st.sampled_from(known))
        owner = tree
        for key in path:
            owner = owner[key]
        match draw(st.sampled_from(["junk", "junk", "gone", "renamed", "another's"])):
            case "gone":
                del owner[last]
            case "renamed" if isinstance(owner, dict):
                owner[f"{last}_"] = owner.pop(last)
            case "another's":
                value = tree
                for key in draw(st.sampled_from(known)):
                    value = value[key]
                owner[last] = copy.deepcopy(value)
            case _:
                owner[last] = draw(st.sampled_from(JUNK))
    return tree


@st.composite
def text_of(draw: Draw, whole: bytes, load: Callable[[str], Any], dump: Callable[[Any], str]) -> bytes:
    """A text with a tree in it: the tree damaged, or the bytes; or what is no such tree, or one without an end."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([b"", b"[" * 100_000, b"[]", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"{}" * 2]))
    if draw(st.integers(0, 3)) == 0:
        return bytes(draw(bytes_of(whole)))
    return dump(draw(tree_of(load(whole.decode())))).encode("utf-8", "surrogatepass")


def json_of(whole: bytes) -> st.SearchStrategy[bytes]:
    """A damaged JSON file."""
    return text_of(whole, json.loads, json.dumps)


def lines_of(whole: bytes) -> st.SearchStrategy[bytes]:
    """A damaged file of JSON lines."""
    return text_of(
        whole,
        lambda text: [json.loads(line) for line in text.splitlines()],
        lambda lines: "".join(f"{json.dumps(line)}\n" for line in (lines if isinstance(lines, list) else [lines])),
    )


def yaml_of(whole: bytes) -> st.SearchStrategy[bytes]:
    """A damaged YAML file, and YAML that would make objects or never end."""
    bad = [
        "!!python/object/apply:os.system ['touch harmed']", "a: &a [*a]", "sparsity: 2001-13-45", "sparsity: !!int x",
        "sparsity: " + "9" * 5000, "? [a]\n: b", "sparsity: !!bool x", "a: " + "{a: " * 3000 + "}" * 3000,
        "a: &a [x, x]\nb: &b [*a, *a]\nskip: [*b, *b]", "sparsity: !!timestamp x", "\t", "---\na: 1\n---\nb: 2",
        "a: \0",
    ]  # fmt: skip
    dump = text_of(whole, yaml.safe_load, lambda tree: yaml.dump(tree, allow_unicode=False))
    return st.one_of(dump, dump, dump, st.sampled_from([text.encode() for text in bad]))


@st.composite
def safetensors_of(draw: Draw, whole: bytes) -> bytes:
    """Damaged bytes, or a header that says something else of the same bytes, whose length may be another, too."""
    if draw(st.booleans()):
        return bytes(draw(bytes_of(whole)))
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.dumps(draw(tree_of(json.loads(whole[8 : 8 + length])))).encode()
    said = draw(st.sampled_from([len(header)] * 5 + [0, 8, len(header) - 1, len(whole), 10**8, 2**40, 2**64 - 1]))
    return bytes(struct.pack("<Q", said) + header + whole[8 + length :])


# ------------------------------------------------------------------------------------------------ subjects


@dataclass(frozen=True)
class Subject:
    """A kind of input. folder: a whole one, read and never written to; file: what is damaged in a copy of it; damaged:
    how; words: of the command; work: where it is run, beside the copy, which is called `it`; output: where its result
    goes.
    """

    folder: Path
    file: str
    damaged: Callable[[bytes], st.SearchStrategy[bytes]]
    words: tuple[str, ...]
    work: Path
    output: str = "out"

    @cached_property
    def whole(self) -> bytes:
        """The file as it should be."""
        return (self.folder / self.file).read_bytes()

    @property
    def cases(self) -> st.SearchStrategy[bytes]:
        """The file's bytes, damaged."""
        return self.damaged(self.whole)

    def run(self, content: bytes) -> tuple[Result, dict[str, bytes]]:
        """What the command says, and the weights it writes, when the file has this content."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.folder, self.work / "it")
        (self.work / "it" / self.file).write_bytes(content)
        with chdir(self.work):
            result = CliRunner().invoke(app, list(self.words))
        made = (self.work / self.output).glob("*.safetensors")
        return result, {path.name: path.read_bytes() for path in made}

    @cached_property
    def expected(self) -> tuple[str, dict[str, bytes]]:
        """What comes of the whole file."""
        result, made = self.run(self.whole)
        assert result.exit_code == 0, result.stderr
        return result.stdout, made

    def verdict(self, content: bytes) -> str:
        """`refused`, `same` or `other`: one error and nothing that loads; the result of the whole file; another one.

        Raises AssertionError for all else.
        """
        expected = self.expected
        result, made = self.run(content)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise AssertionError(f"{self.file}: a crash") from result.exception
        assert not {"\x1b", "\ud800"}.intersection(result.output), result.output
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        if result.exit_code == 0:
            assert not errors
            return "same" if (result.stdout, made) == expected else "other"
        assert result.exit_code in (1, 2), result.stderr
        assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0], result.stderr
        assert len(errors[0]) < 3000
        assert not (self.work / self.output / "config.json").exists()
        return "refused"


SMALL = ("--solver", "magnitude", "--nsamples", "1", "--seqlen", "8", "--set", "data.heldout=1")
QUICK = (*SMALL, "--eval", "none", "-o")
PLANNED = (*SMALL, "--dry-run", "--json", "--dataset")
DEMO = Path(str(files("obsprune") / "demo"))
RECIPE: dict[str, Any] = {
    "data": {"nsamples": 2, "seqlen": 8, "heldout": 1}, "solver": {"name": "magnitude"}, "sparsity": 0.5,
    "pattern": "row", "skip": ["o_proj"], "engine": {"device": "cpu", "batch_size": 2},
    "seed": 3, "matching": {"passes": 1, "steps": 2}, "target": "corrected", "correction": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """Whole inputs of every kind, each made once under a folder."""

    root: Path
    made: dict[str, Subject] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)

    @cached_property
    def zoo(self) -> Zoo:
        return Zoo(self.root / "zoo")

    @cached_property
    def tokens(self) -> str:
        return str(tokens_in(self.root))

    @cached_property
    def labels(self) -> Path:
        return pictures_in(self.root)

    @cached_property
    def sharded(self) -> Path:
        folder = self.root / "sharded"
        random_model(ZOO["llama"]).save_pretrained(folder, max_shard_size="20KB")
        return folder

    @cached_property
    def pickled(self) -> Path:
        source, folder = self.zoo("llama"), self.root / "pickled"
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
        torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
        return folder

    @cached_property
    def recipe(self) -> Path:
        folder = self.root / "recipe"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(
            yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"dataset": self.tokens}})
        )
        return folder

    @cached_property
    def rows(self) -> Path:
        folder = self.root / "rows"
        folder.mkdir()
        return Path(shutil.copy(self.tokens, folder)).parent

    @cached_property
    def texts(self) -> Path:
        folder = self.root / "texts"
        folder.mkdir()
        texts = ["Mia put the red ball in the box.", "", "Tom gave the book to Mia and went home.", "é ï 中文 🙂"] * 8
        (folder / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
        rows = [{"text": text, "number": number} for number, text in enumerate(texts)]
        (folder / "text.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (folder / "text.json").write_text(json.dumps(rows))
        with (folder / "text.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "number"])
            writer.writeheader()
            writer.writerows(rows)
        datasets.Dataset.from_list(rows).to_parquet(folder / "text.parquet")
        return folder

    def _pruned(self, name: str, task: str) -> Path:
        output = self.root / name
        words = ["prune", str(self.zoo("llama")), "--dataset", self.tokens, *SMALL, "--eval", task, "-o", str(output)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.stderr
        return output

    @cached_property
    def finished(self) -> Path:
        """A whole run with its report."""
        return self._pruned("finished", "heldout")

    @cached_property
    def killed(self) -> Path:
        """What is left of a run that was killed after two of its three blocks."""
        output = self._pruned("killed", "none")
        journal = output / "progress.jsonl"
        kept = [line for line in journal.read_text().splitlines() if json.loads(line)["kind"] in ("start", "block")][:3]
        journal.write_text("".join(f"{line}\n" for line in kept))
        for path in output.iterdir():
            if path.name not in ("progress.jsonl", "recipe.yaml", BLOCK, BLOCK.replace("2-", "3-")):
                path.unlink()
        return output


BLOCK = "model-00002-of-00004.safetensors"
Make = Callable[[Whole], Subject]


def weights(folder: Callable[[Whole], Path], file: str | None, how: Callable[[bytes], Any]) -> Make:
    """A file of a Llama's weights; None: the first shard."""

    def make(whole: Whole) -> Subject:
        source = folder(whole)
        name = file or min(path.name for path in source.glob("*.safetensors"))
        return Subject(
            source, name, how, ("prune", "it", "--dataset", whole.tokens, *QUICK, "out"), whole.root / "work"
        )

    return make


def config(family: str, file: str = "config.json") -> Make:
    """A JSON file of a model, which is then pruned."""

    def make(whole: Whole) -> Subject:
        data = f"imagenet={whole.labels}" if family in PICTURED else whole.tokens
        words = ("prune", "it", "--dataset", data, *QUICK, "out")
        return Subject(whole.zoo(family), file, json_of, words, whole.root / "work")

    return make


def tokenizer(file: str) -> Make:
    """A JSON file of the demo's tokenizer."""
    words = ("prune", "it", *PLANNED, str(DEMO / "calibration.txt"))
    return lambda whole: Subject(DEMO, file, json_of, words, whole.root / "work")


def table(file: str, how: Callable[[bytes], Any]) -> Make:
    """A data set of texts."""
    return lambda whole: Subject(whole.texts, file, how, ("prune", "demo", *PLANNED, f"it/{file}"), whole.root / "work")


def pictures(file: str, *few: str) -> Make:
    """A file of a data set of images."""

    def make(whole: Whole) -> Subject:
        words = ("prune", str(whole.zoo("vit")), "--dataset", "imagenet=it/labels.tsv", *QUICK, "out", *few)
        return Subject(whole.labels.parent, file, bytes_of, words, whole.root / "work")

    return make


def on_llama(folder: Callable[[Whole], Path], file: str, how: Callable[[bytes], Any], *words: str) -> Make:
    """A file that is used with an undamaged Llama; TOKENS in the words is its data set."""

    def make(whole: Whole) -> Subject:
        told = ("prune", str(whole.zoo("llama")), *(whole.tokens if word == "TOKENS" else word for word in words))
        return Subject(folder(whole), file, how, told, whole.root / "work", words[-1])

    return make


SUBJECTS: dict[str, Make] = {
    "weights": weights(lambda whole: whole.zoo("llama"), "model.safetensors", safetensors_of),
    "weights, one shard of several": weights(lambda whole: whole.sharded, None, safetensors_of),
    "weights, a pickle": weights(lambda whole: whole.pickled, "pytorch_model.bin", bytes_of),
    "index of shards": weights(lambda whole: whole.sharded, "model.safetensors.index.json", json_of),
    "config of a Llama": config("llama"),
    "config of a GPT-2": config("gpt2"),
    "config of a Gemma 3": config("gemma3"),
    "config of a Mixtral": config("mixtral"),
    "config of a ViT": config("vit"),
    "config of a ResNet": config("resnet-basic"),
    "image processor": config("vit", "preprocessor_config.json"),
    "tokenizer": tokenizer("tokenizer.json"),
    "tokenizer's config": tokenizer("tokenizer_config.json"),
    "text": table("text.txt", bytes_of),
    "table, JSON lines": table("text.jsonl", lines_of),
    "table, JSON": table("text.json", json_of),
    "table, CSV": table("text.csv", bytes_of),
    "table, Parquet": table("text.parquet", bytes_of),
    "token ids": on_llama(lambda whole: whole.rows, "tokens.safetensors", safetensors_of,
                          "--dataset", "it/tokens.safetensors", *QUICK, "out"),
    "an image": pictures("00.jpg", "--nsamples", "24", "--set", "data.heldout=0"),
    "labels of images": pictures("labels.tsv"),
    "recipe": on_llama(lambda whole: whole.recipe, "recipe.yaml", yaml_of,
                       "--config", "it/recipe.yaml", "--eval", "none", "-o", "out"),
    "journal of a killed run": on_llama(lambda whole: whole.killed, "progress.jsonl", lines_of,
                                        "--dataset", "TOKENS", *QUICK, "it"),
    "block of a killed run": on_llama(lambda whole: whole.killed, BLOCK, safetensors_of,
                                      "--dataset", "TOKENS", *QUICK, "it"),
    "report of a result": lambda whole: Subject(whole.finished, "report.json", json_of, ("inspect", "it"),
                                                whole.root / "work"),
    "recipe of a result": lambda whole: Subject(whole.finished, "recipe.yaml", yaml_of,
                                                ("eval", "it", "--task", "heldout"), whole.root / "work"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the table


def tried(subject: Subject, cases: int) -> Counter[str]:
    """How many of so many cases end with which verdict, always the same ones. Raises AssertionError as `verdict`."""
    found: Counter[str] = Counter()
    whatever = {"derandomize": True, "deadline": None, "database": None, "phases": [Phase.generate]}

    @settings(max_examples=cases, suppress_health_check=list(HealthCheck), **whatever)  # type: ignore[arg-type]
    @given(subject.cases)
    def one(content: bytes) -> None:
        found[subject.verdict(content)] += 1

    one()
    return found


def page(rows: dict[str, Counter[str]]) -> str:
    """A Markdown table of the verdicts, with their sums."""
    told = {**rows, "all": sum(rows.values(), Counter())}
    lines = [
        f"| {name} | {sum(found.values())} | {found['refused']} | {found['same']} | {found['other']} |"
        for name, found in told.items()
    ]
    head = "| what was damaged | cases | refused, one error | same result | another result |\n|---|---|---|---|---|\n"
    return head + "\n".join(lines)
