"""Checkpoints of torch.save: the same model as its safetensors twin, and nothing in a file is ever run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zoo import Zoo, logits, reference, tensors, token_batches

from obsprune.engine.rundir import RunDir
from obsprune.errors import InputError
from obsprune.models.checkpoint import SINGLE, Checkpoint
from obsprune.models.files import PICKLED
from obsprune.models.load import load
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe


def pruned(source: Path, tokens: Path, output: Path) -> dict[str, Any]:
    data = {"dataset": str(tokens), "nsamples": 16, "seqlen": 32, "heldout": 8}
    solver = {"name": "sparsegpt"}
    tree = {"model": {"name": str(source)}, "data": data, "evaluation": ["none"], "solver": solver}
    return prune(make_recipe(tree), output, Silent())


def one_file(path: Path, stored: dict[str, torch.Tensor]) -> None:
    torch.save(stored, path / PICKLED.single)


def old_file(path: Path, stored: dict[str, torch.Tensor]) -> None:
    """As torch.save wrote before 1.6; it cannot be mapped into memory."""
    torch.save(stored, path / PICKLED.single, _use_new_zipfile_serialization=False)


def two_files(path: Path, stored: dict[str, torch.Tensor]) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for at, name in enumerate(names):
        torch.save(dict(list(stored.items())[at::2]), path / name)
    weight_map = {key: names[at % 2] for at, key in enumerate(stored)}
    (path / PICKLED.index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


Write = Callable[[Path, dict[str, torch.Tensor]], None]


def rewritten(source: Path, path: Path, write: Write) -> dict[str, torch.Tensor]:
    """A copy of a checkpoint with its weights in other files."""
    shutil.copytree(source, path)
    stored = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    if "lm_head.weight" not in stored:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]  # what torch.save keeps of a tied head
    write(path, stored)
    return stored


@pytest.mark.parametrize("write", [one_file, old_file, two_files])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_result_of_a_bin_file_is_that_of_its_twin(
    zoo: Zoo, tokens: Path, tmp_path: Path, write: Write, family: str
) -> None:
    stored = rewritten(zoo(family), tmp_path / "bin", write)
    batch = token_batches(1)[0]
    model = load(str(tmp_path / "bin"))
    with model.lazily_loaded():
        assert torch.equal(logits(model.network, batch), logits(reference(zoo(family)), batch))
    pruned(tmp_path / "bin", tokens, tmp_path / "out")
    pruned(zoo(family), tokens, tmp_path / "twin")
    out, twin = tensors(tmp_path / "out"), tensors(tmp_path / "twin")
    assert out.keys() == stored.keys()
    assert all(torch.equal(out[key], twin[key]) for key in twin)
    assert torch.equal(logits(reference(tmp_path / "out"), batch), logits(reference(tmp_path / "twin"), batch))
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_headers_are_had_without_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.int64]
    torch.save({str(kind): torch.ones(2, 3).to(kind) for kind in kinds}, tmp_path / PICKLED.single)
    asked: list[Any] = []
    whole = torch.load

    def observed(*args: Any, **options: Any) -> Any:
        asked.append((options["mmap"], options["weights_only"]))
        return whole(*args, **options)

    monkeypatch.setattr(torch, "load", observed)
    headers = Checkpoint.open(tmp_path).headers
    assert {key: (header.dtype, header.shape) for key, header in headers.items()} == {
        str(kind): (kind, (2, 3)) for kind in kinds
    }
    assert asked == [(True, True)]


def test_no_two_tensors_of_a_reading_share_memory(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    torch.save({"a": whole, "b": whole, "c": whole.T, "d": whole[1]}, tmp_path / PICKLED.single)
    read = Checkpoint.open(tmp_path).read("abcd")
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == 4
    assert all(tensor.is_contiguous() for tensor in read.values())
    for key, tensor in {"a": whole, "b": whole, "c": whole.T, "d": whole[1]}.items():
        assert torch.equal(read[key], tensor)
        assert read[key].untyped_storage().nbytes() == 4 * tensor.numel()


def test_safetensors_win(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo("llama"), tmp_path / "both")
    (tmp_path / "both" / PICKLED.single).write_bytes(b"never read")
    assert Checkpoint.open(tmp_path / "both").headers == Checkpoint.open(zoo("llama")).headers


class Harmful:
    """What a pickle could do to whoever opens it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/obsprune-was-harmed"),)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"a": torch.ones(2), "b": Harmful()}, "holds Python objects beside its tensors"),
        ([torch.ones(2)], "no table of tensors"),
        ({"model": {"a": torch.ones(2)}}, "no table of tensors"),
        ({"a": torch.ones(2).to_sparse()}, "no table of tensors"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "tensor a has dtype torch.complex64, which cannot be pruned"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, held: Any, says: str) -> None:
    torch.save(held, tmp_path / PICKLED.single)
    refused(tmp_path, says)
    assert not Path("/tmp/obsprune-was-harmed").exists()


def refused(path: Path, *says: str) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(phrase in message for phrase in says), message


@pytest.mark.parametrize("write", [one_file, old_file])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.98])
def test_truncated_files(tmp_path: Path, write: Write, part: float) -> None:
    write(tmp_path, {"a": torch.ones(1000), "b": torch.ones(1000)})
    path = tmp_path / PICKLED.single
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    refused(tmp_path, "download it again")


def test_a_missing_shard(tmp_path: Path) -> None:
    two_files(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)})
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    refused(tmp_path, "lacks 'pytorch_model-00002-of-00002.bin'")
    (tmp_path / PICKLED.index).write_text("[")
    refused(tmp_path, "is not a PyTorch index")


def test_a_run_is_of_one_version_of_its_files(
    zoo: Zoo, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = rewritten(zoo("llama"), tmp_path / "bin", one_file)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            pruned(tmp_path / "bin", tokens, tmp_path / "out")
    torch.save(stored | {"extra": torch.ones(3)}, tmp_path / "bin" / PICKLED.single)
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        pruned(tmp_path / "bin", tokens, tmp_path / "out")
    assert (tmp_path / "out/progress.jsonl").is_file()
