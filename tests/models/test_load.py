"""Opening checkpoints: what is found in them, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import DetrConfig
from zoo import ZOO, Zoo, logits, reference, token_batches

from obsprune.errors import InputError, OutputError
from obsprune.models import checkpoint
from obsprune.models.load import Model, load, locate

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("family", ZOO)
def test_blocks_and_matrices_of_every_family(zoo: Zoo, family: str) -> None:
    model, expected = load(str(zoo(family))), ZOO[family]
    assert [block.name for block in model.blocks] == [f"{expected.blocks}.{i}" for i in range(expected.depth)]
    assert sorted(matrix.name for matrix in model.matrices) == sorted(expected.matrices)
    assert {"output head", "embedding"} & set(model.skipped.values())
    for matrix in model.matrices:
        rows, columns = matrix.shape
        assert columns % 4 == 0 and rows > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_is_on_meta_but_while_it_is_loaded(zoo: Zoo, family: str) -> None:
    model = load(str(zoo(family)))
    block = model.blocks[1]
    buffers = {name: buffer.clone() for name, buffer in block.module.named_buffers()}
    assert all(parameter.is_meta for parameter in block.module.parameters())
    with block.loaded(model.device):
        assert not any(parameter.is_meta for parameter in block.module.parameters())
    assert all(parameter.is_meta for parameter in block.module.parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in block.module.named_buffers())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_matrix_is_rows_by_columns_whatever_the_layer_stores(zoo: Zoo, family: str) -> None:
    model = load(str(zoo(family)))
    block = model.blocks[0]
    with block.loaded(model.device):
        for matrix in block.matrices:
            x = torch.randn(3, matrix.shape[1])
            bias = dict(matrix.module.named_parameters()).get("bias", torch.zeros(()))
            torch.testing.assert_close(matrix.module(x) - bias, x @ matrix.read().T)
            weight = torch.randn(matrix.shape)
            matrix.write(weight)
            assert torch.equal(matrix.read(), weight)


def test_plain_forward_with_lazy_blocks(zoo: Zoo) -> None:
    model, batch = load(str(zoo("llama"))), token_batches(1)[0]
    with model.lazily_loaded():
        assert torch.equal(logits(model.network, batch), logits(reference(zoo("llama")), batch))
    assert all(parameter.is_meta for parameter in model.blocks[0].module.parameters())


def test_a_checkpoint_without_its_base_prefix(zoo: Zoo, tmp_path: Path) -> None:
    """The hub's gpt2 says h.0… where the module is transformer.h.0…"""
    path = copied(zoo("gpt2"), tmp_path)
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    model = load(str(path))
    assert "h.1.mlp.c_fc.weight" in model.blocks[1].keys
    batch = token_batches(1)[0]
    with model.lazily_loaded():
        assert torch.equal(logits(model.network, batch), logits(reference(zoo("gpt2")), batch))


@pytest.mark.parametrize(("stored", "computed"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_compute_dtype_on_a_cpu(zoo: Zoo, stored: torch.dtype, computed: torch.dtype) -> None:
    model = load(str(zoo("llama", stored)), device="cpu")
    with model.blocks[0].loaded(model.device):
        matrix = model.matrices[0]
        assert (model.dtype, matrix.weight.dtype, matrix.read().dtype) == (computed, computed, stored)


def test_a_checkpoint_in_many_shards(zoo: Zoo, tmp_path: Path) -> None:
    """Shards so small that every block lies in several of them."""
    reference(zoo("llama")).save_pretrained(tmp_path, max_shard_size="20KB")
    model, batch = load(str(tmp_path)), token_batches(1)[0]
    files = {model.checkpoint.headers[key].file for key in model.blocks[1].keys}
    assert len(files) > 1
    with model.lazily_loaded():
        assert torch.equal(logits(model.network, batch), logits(reference(zoo("llama")), batch))


@pytest.mark.parametrize("stored", ["equal", "different", "alone"])
def test_a_head_stored_beside_the_embedding_it_is_tied_to(zoo: Zoo, tmp_path: Path, stored: str) -> None:
    """Transformers ties it when it is equal or alone; when it differs, the config is wrong and it is not tied."""
    path = copied(zoo("llama-tied"), tmp_path)
    tensors = load_file(path / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.1 if stored == "different" else 0.0)
    if stored == "alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    model, plain, batch = load(str(path)), reference(path), token_batches(1)[0]
    tied = plain.lm_head.weight is plain.model.embed_tokens.weight
    assert tied is (stored != "different")
    with model.lazily_loaded():
        assert torch.equal(logits(model.network, batch), logits(plain, batch))


def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def configure(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def refused(path: Path, *says: str) -> None:
    with pytest.raises(InputError) as caught:
        use(load(str(path)))
    assert all(phrase in str(caught.value) for phrase in says), caught.value


def use(model: Model) -> None:
    for block in model.blocks:
        with block.loaded(model.device):
            pass


def test_damaged_checkpoints(zoo: Zoo, tmp_path: Path) -> None:
    path = copied(zoo("llama"), tmp_path)
    tensors = load_file(path / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    for tensor, says in [(None, "no weight for"), (torch.ones(2, 2), "(2, 2)"), (tensors[name] / 0, "NaN")]:
        changed = {key: value for key, value in (tensors | {name: tensor}).items() if value is not None}
        save_file(changed, path / WEIGHTS, metadata={"format": "pt"})
        refused(path, name.removesuffix(".weight"), says)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-8])
    refused(path, WEIGHTS, "truncated")
    (path / WEIGHTS).unlink()
    refused(path, "holds no model.safetensors")
    (path / "model.gguf").touch()
    refused(path, "model.gguf", "save_pretrained")


def test_infinity_outside_the_blocks(zoo: Zoo, tmp_path: Path) -> None:
    path = copied(zoo("llama"), tmp_path)
    tensors = load_file(path / WEIGHTS)
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    refused(path, "model.norm.weight", "infinity")


def test_a_missing_head_outside_the_blocks(zoo: Zoo, tmp_path: Path) -> None:
    path = copied(zoo("llama"), tmp_path)
    tensors = load_file(path / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    refused(path, "no weight for lm_head.weight")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ('{"weight_map": {"a": "../outside.safetensors"}}', "outside"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "lacks 'model-9.safetensors'"),
        ("{}", "not a safetensors index"),
        ("[", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": {"a": 3}}', "lacks '3'"),
    ],
)
def test_bad_indexes(zoo: Zoo, tmp_path: Path, index: str, says: str) -> None:
    path = copied(zoo("llama"), tmp_path)
    (path / checkpoint.INDEX).write_text(index)
    refused(path, says)


def test_other_kinds_of_models(zoo: Zoo, tmp_path: Path) -> None:
    path = copied(zoo("llama"), tmp_path)
    configure(path, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(path, "quantised")
    configure(path, quantization_config=None, architectures=["LlamaForSequenceClassification"])
    refused(path, "LlamaForSequenceClassification", "no causal language model")
    DetrConfig().save_pretrained(path)
    refused(path, "detr", "neither a causal language model nor an image classifier, nor")
    (path / "config.json").write_text("{")
    refused(path, "config.json")
    (path / "config.json").unlink()
    refused(path, "is not a checkpoint: it has no config.json")


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        checkpoint.write_shard(tmp_path / WEIGHTS, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "asked", "kept"),
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], 1, {"model.safetensors"}),
        (["obsprune-1-of-1.safetensors", "obsprune.safetensors.index.json"], 1, {"obsprune-1-of-1.safetensors"}),
        (["pytorch_model-1-of-1.bin", "pytorch_model.bin.index.json"], 2, {"pytorch_model-1-of-1.bin"}),
        (["pytorch_model.bin", "training_args.bin", "original/consolidated.00.pth"], 2, {"pytorch_model.bin"}),
        (["consolidated.00.pth", "consolidated.01.pth"], 3, {"consolidated.00.pth", "consolidated.01.pth"}),
    ],
)
def test_a_download_fetches_each_weight_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], asked: int, kept: set[str]
) -> None:
    """Many repositories hold the same weights twice or three times."""
    calls: list[str] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str], **options: object) -> str:
        assert (name, options) == ("someone/model", {"revision": "v1", "token": "hf_x"})
        calls.append(name)
        for file in filter_repo_objects([*files, "config.json", "params.json"], allow_patterns=allow_patterns,
                                        ignore_patterns=ignore_patterns):  # fmt: skip
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("obsprune.models.hub.snapshot_download", download)
    assert locate("someone/model", "v1", "hf_x") == tmp_path
    assert len(calls) == asked
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".json"} == kept


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GatedRepoError, "is gated: accept its licence"),
        (RevisionNotFoundError, "has no revision 'v1'"),
        (RepositoryNotFoundError, "no Hugging Face model 'someone/model'"),
        (HFValidationError, "neither a directory nor a Hugging Face id"),
        (LocalEntryNotFoundError, "the hub cannot be reached"),
        (OSError, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: type[Exception], says: str) -> None:
    def download(*_: object, **__: object) -> str:
        raise error.__new__(error)

    monkeypatch.setattr("obsprune.models.hub.snapshot_download", download)
    with pytest.raises(InputError, match=says):
        locate("someone/model", "v1")
