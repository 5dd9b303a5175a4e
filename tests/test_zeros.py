"""The zeros of a result outlive what people do with it: casts, other shards, one file, another dtype to load in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from zoo import CLASSIFIERS, Zoo, tensors

from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe

TINY = 1e-9
"""A weight that bfloat16 has and float16 has not."""


@pytest.fixture(params=["llama", "mixtral", "vit"], scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def result(
    family: str, zoo: Zoo, tokens: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A dense checkpoint, and what pruning makes of it; one of the weights that are left is TINY."""
    images = family in CLASSIFIERS
    source = zoo.classifier(family, CLASSIFIERS[family]) if images else zoo(family)
    data = {"dataset": f"imagenet={pictures}" if images else str(tokens), "nsamples": 2, "seqlen": 32, "heldout": 2}
    tree = {"model": {"name": str(source)}, "data": data, "solver": {"name": "magnitude"}, "evaluation": ["none"]}
    output = tmp_path_factory.mktemp("zeros") / family
    report = prune(make_recipe(tree), output, Silent())
    assert report["sparsity"]["reached"] == 0.5
    path = sorted(output.glob("model-*.safetensors"))[1]  # of the first block
    held = load_file(path)
    matrix = next(x for x in held.values() if x.dim() == 2 and (x == 0).any())
    matrix.view(-1)[int(matrix.view(-1).nonzero()[0])] = TINY
    save_file(held, path, metadata={"format": "pt"})
    return source, output


def auto(family: str) -> Any:
    return AutoModelForImageClassification if family in CLASSIFIERS else AutoModelForCausalLM


def zeros(directory: Path) -> dict[str, Tensor]:
    return {name: tensor == 0 for name, tensor in tensors(directory).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def count(found: dict[str, Tensor]) -> int:
    return sum(int(zero.sum()) for zero in found.values())


def test_nothing_of_ours_is_in_the_config(result: tuple[Path, Path]) -> None:
    source, output = result
    assert (output / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_casts_keep_them_and_add_only_what_is_too_small(family: str, result: tuple[Path, Path], tmp_path: Path) -> None:
    before = zeros(result[1])
    auto(family).from_pretrained(result[1]).to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    assert same(zeros(tmp_path / "bfloat16"), before)
    auto(family).from_pretrained(tmp_path / "bfloat16").to(torch.float16).save_pretrained(tmp_path / "float16")
    after, cast = zeros(tmp_path / "float16"), tensors(tmp_path / "bfloat16")
    assert same(after, {name: tensor.to(torch.float16) == 0 for name, tensor in cast.items()})
    assert all(after[name][before[name]].all() for name in before) and count(after) == count(before) + 1


def test_loading_in_another_dtype_is_such_a_cast(family: str, result: tuple[Path, Path], tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        auto(family).from_pretrained(result[1], dtype=dtype).save_pretrained(tmp_path / str(dtype))
        expected = {name: tensor.to(dtype) for name, tensor in tensors(result[1]).items()}
        assert same(tensors(tmp_path / str(dtype)), expected)


def test_other_shards_and_one_file_keep_them(family: str, result: tuple[Path, Path], tmp_path: Path) -> None:
    expected = tensors(result[1])
    auto(family).from_pretrained(result[1]).save_pretrained(tmp_path / "many", max_shard_size="20kB")
    parts = list((tmp_path / "many").glob("*.safetensors"))
    assert len(parts) > len(list(result[1].glob("*.safetensors"))) and same(tensors(tmp_path / "many"), expected)
    (tmp_path / "one").mkdir()
    merged = {name: tensor for path in parts for name, tensor in load_file(path).items()}
    save_file(merged, tmp_path / "one/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "one/config.json").write_bytes((result[1] / "config.json").read_bytes())
    auto(family).from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("*.safetensors")] == ["model.safetensors"]
    assert same(zeros(tmp_path / "one"), zeros(result[1])) and same(tensors(tmp_path / "again"), expected)
