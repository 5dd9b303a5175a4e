"""Corpora, draws and hashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from zoo import token_rows

from obsprune.errors import InputError
from obsprune.models.corpora import Reading
from obsprune.models.corpora import open_corpus as opened
from obsprune.models.data import Draw, draw
from obsprune.models.text import Corpus, Documents, TokenRows, TokenSamples


class Letters:
    """A tokenizer: BOS 1, then one id a character."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [1, *(ord(letter) for letter in text)]}


def open_corpus(source: str, text_column: str | None = None, split: str = "train", seqlen: int = 4) -> Corpus:
    return opened(source, Reading(Letters, 128, seqlen, text_column), split)


def documents(texts: list[str], seqlen: int = 4, vocabulary: int = 128) -> Documents:
    return Documents("d", texts, Letters, seqlen, vocabulary)


def token_file(ids: Tensor, seqlen: int = 8, vocabulary: int = 128) -> TokenRows:
    return TokenRows("t", ids, seqlen, vocabulary)


def rows_of(corpus: Corpus, nsamples: int = 3, heldout: int = 2, seed: int = 0) -> Any:
    """A draw with its rows of ids laid open."""
    return opened_up(draw(corpus, nsamples, heldout, seed))


def opened_up(found: Draw) -> Any:
    assert isinstance(found.calibration, TokenSamples) and isinstance(found.heldout, TokenSamples)
    further = [samples.ids for samples in found.further if isinstance(samples, TokenSamples)]
    return SimpleNamespace(
        calibration=found.calibration.ids, heldout=found.heldout.ids, further=further, facts=found.facts
    )


def texts_of(path: Path) -> list[str]:
    corpus = open_corpus(str(path))
    assert isinstance(corpus, Documents) and corpus.name == str(path)
    return list(corpus.texts)


def test_documents_are_separated_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one <|endoftext|> in a line\n<|endoftext|>\ntwo\n\nparagraphs\n<|endoftext|>\n")
    assert texts_of(path) == ["one <|endoftext|> in a line", "two\n\nparagraphs"]


def test_a_text_without_separators_is_one_document_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" \n = Title = \n\n text \n")
    assert texts_of(path) == [" \n = Title = \n\n text \n"]


WRITERS: dict[str, Callable[[Dataset, Path], Any]] = {
    "jsonl": lambda table, path: table.to_json(path),
    "csv": lambda table, path: table.to_csv(path),
    "parquet": lambda table, path: table.to_parquet(path),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_tables(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table.{suffix}"
    WRITERS[suffix](Dataset.from_dict({"id": ["a", "b"], "story": ["one", "two"]}), path)
    corpus = open_corpus(str(path), "story")
    assert isinstance(corpus, Documents) and list(corpus.texts) == ["one", "two"]
    with pytest.raises(InputError, match="id, story"):
        open_corpus(str(path))
    with pytest.raises(InputError, match="did you mean story"):
        open_corpus(str(path), "storey")


def test_a_json_list_and_a_damaged_table(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": None}, {"text": "two"}]))
    ids = open_corpus(str(tmp_path / "a.json")).every().ids
    assert ids.tolist() == [[1, *map(ord, "one")], [1, *map(ord, "two")]]
    (tmp_path / "b.jsonl").write_text('{"text": ')
    with pytest.raises(InputError, match="cannot be read as json"):
        open_corpus(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.xml").write_text("<a/>")
    with pytest.raises(InputError, match="unknown kind of file"):
        open_corpus(str(tmp_path / "c.xml"))


def test_token_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"input_ids": token_rows(5, 8), "other": token_rows(2, 8, 1), "x": torch.ones(2, 2)}, path)
    corpus = open_corpus(f"{path}:other")
    assert isinstance(corpus, TokenRows) and torch.equal(corpus.ids, token_rows(2, 8, 1))
    assert sorted(rows_of(open_corpus(str(path), seqlen=8)).calibration.tolist()) != []
    with pytest.raises(InputError, match="did you mean other"):
        open_corpus(f"{path}:others")
    with pytest.raises(InputError, match="not integer ids"):
        open_corpus(f"{path}:x")


def test_all_rows_of_a_token_file_are_used_as_they_are() -> None:
    ids = token_rows(5, 8)
    found = rows_of(token_file(ids), nsamples=5, heldout=3)
    assert sorted(found.calibration.tolist()) == sorted(ids.tolist())
    assert len(found.heldout) == 0 and found.facts["heldout"] == 0


def test_ids_outside_the_vocabulary() -> None:
    with pytest.raises(InputError, match=r"token ids 0…200 and the model knows 0…127"):
        rows_of(token_file(torch.tensor([[0, 200]] * 5), 4))


def test_too_short() -> None:
    with pytest.raises(InputError, match="gives 2 sequences of 4 tokens and 3 are asked for"):
        rows_of(documents(["abcdefgh"]))


STORIES = documents([letter * 9 for letter in "abcdefghijklmnop"])


def test_a_seed_decides_the_draw() -> None:
    first, again, other = rows_of(STORIES), rows_of(STORIES), rows_of(STORIES, seed=1)
    assert first.facts == again.facts and torch.equal(first.calibration, again.calibration)
    assert first.facts["sha256"] == TokenSamples(first.calibration).content_hash() != other.facts["sha256"]


@pytest.mark.parametrize("seed", range(5))
def test_calibration_and_held_out_rows_are_disjoint(seed: int) -> None:
    corpus = documents(["".join(map(chr, range(33, 120)))])  # one long document, every token once
    found = rows_of(corpus, nsamples=12, heldout=6, seed=seed)
    used = [token for row in [*found.calibration.tolist(), *found.heldout.tolist()] for token in row]
    assert len(used) == len(set(used)) == 4 * 18


def test_every_row_starts_where_the_last_ended() -> None:
    corpus = documents(["abc", "defg"], 3)
    assert corpus.every().ids.tolist() == [[1, *map(ord, "ab")], [ord("c"), 1, ord("d")], [*map(ord, "efg")]]
    assert corpus.joined == "2 documents, each tokenised by itself"


def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: Dataset, suffix: str) -> list[tuple[str, str, str]]:
    """A hub that answers every download with one small table, and remembers what was asked."""
    asked: list[tuple[str, str, str]] = []

    def download(repository: str, file: str, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        WRITERS[suffix](table, tmp_path / f"table.{suffix}")
        return str(tmp_path / f"table.{suffix}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_wikitext2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = hub(monkeypatch, tmp_path, Dataset.from_dict({"text": ["", " = Title = \n", "line"]}), "parquet")
    corpus = open_corpus("wikitext2", split="test")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", "dataset")]
    assert isinstance(corpus, Documents) and list(corpus.texts) == ["\n\n = Title = \n\n\nline"]


def test_c4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = Dataset.from_dict({"text": [str(number) for number in range(1200)]})
    asked = hub(monkeypatch, tmp_path, table, "jsonl")
    train, test = open_corpus("c4"), open_corpus("c4", split="test")
    assert isinstance(train, Documents) and len(train.texts) == 1200
    assert isinstance(test, Documents) and test.texts == [" ".join(str(number) for number in range(1100))]
    files = ["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"]
    assert asked == [("allenai/c4", file, "dataset") for file in files]


def drawn(corpus: Corpus, rounds: int, nsamples: int = 4, heldout: int = 3) -> Any:
    return opened_up(draw(corpus, nsamples, heldout, 5, rounds))


def corpora(rows: int) -> list[Any]:
    """Rows that are all different, as a table of ids and as documents."""
    texts = [
        "".join(chr(32 + (number * 8 + place) % 90 + number // 40) for place in range(8)) for number in range(rows)
    ]
    return [token_file(torch.arange(rows * 8).view(rows, 8) % 256, 8, 256), documents(texts, 8, 256)]


@pytest.mark.parametrize("kind", [0, 1])
def test_rounds_get_new_rows_and_the_first_is_as_without_them(kind: int) -> None:
    corpus = corpora(20)[kind]
    alone, three = drawn(corpus, 1), drawn(corpus, 3)
    assert torch.equal(alone.calibration, three.calibration) and torch.equal(alone.heldout, three.heldout)
    assert alone.further == [] and "rounds" not in alone.facts
    rows = torch.cat([three.calibration, three.heldout, *three.further])
    assert len(rows.unique(dim=0)) == len(rows) == 15
    assert three.facts["rounds"]["fresh"] == [True] * 3
    assert three.facts["rounds"]["seen"] == 12


@pytest.mark.parametrize("kind", [0, 1])
def test_rounds_without_new_rows_get_reshuffled_ones_but_never_held_out_ones(kind: int) -> None:
    few = drawn(corpora(12)[kind], 4)
    assert few.facts["rounds"]["fresh"] == [True, True, False, False]
    assert few.facts["rounds"]["seen"] in (8, 9)  # the ninth is drawn, or not
    held = {tuple(row) for row in few.heldout.tolist()}
    for part in few.further:
        assert len(part) == 4 and not held & {tuple(row) for row in part.tolist()}
    assert not torch.equal(few.further[1], few.further[2])
