"""`obsprune mask export` and `apply`: the zeros of one checkpoint on another of the same architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from driver import Cli
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import ZOO, Zoo, shards, tensors

from obsprune.engine.rundir import REPORT
from obsprune.models.load import load
from obsprune.models.masks import MaskFile
from obsprune.pipeline import prune
from obsprune.progress import Silent
from obsprune.recipe import make_recipe


def pruned(source: Path, tokens: Path, output: Path, pattern: str = "unstructured") -> Path:
    tree = {"model": {"name": str(source)}, "data": {"dataset": str(tokens), "nsamples": 4, "seqlen": 32}}
    prune(make_recipe(tree, {"solver": {"name": "magnitude"}, "pattern": pattern}), output, Silent())
    return output


def tuned(source: Path, output: Path, seed: int = 3) -> Path:
    """Another checkpoint of the same architecture: no weight as before, and none zero."""
    shutil.copytree(source, output)
    generator = torch.Generator().manual_seed(seed)
    for path in output.glob("*.safetensors"):
        held = {
            name: torch.rand(x.shape, generator=generator).add(0.1).to(x.dtype) for name, x in load_file(path).items()
        }
        save_file(held, path, metadata={"format": "pt"})
    return output


def done(cli: Cli, *words: object) -> str:
    result = cli(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


def refused(cli: Cli, *words: object) -> str:
    result = cli(*words)
    assert result.exit_code == 2 and result.stdout == "", result.output
    return result.stderr


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32), ("mixtral", torch.float32)]
)
def test_masks_go_from_a_result_to_another_checkpoint(
    cli: Cli, zoo: Zoo, tokens: Path, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    source = zoo(family, dtype)
    result = pruned(source, tokens, tmp_path / "result", "2:4")
    found = json.loads(done(cli, "mask", "export", result, "-o", "masks/one.safetensors", "--json"))
    masks, sparse = MaskFile.open(tmp_path / "masks/one.safetensors"), tensors(result)
    names = load(str(source)).names.sources
    expected = {key for matrix in load(str(source)).matrices for key in names[matrix.parameter]}
    assert masks.shapes.keys() == expected and masks.pattern == found["pattern"] == "2:4"
    assert found["zeros"] == sum(int((sparse[name] == 0).sum()) for name in expected) == found["weights"] / 2

    other = tuned(source, tmp_path / "other")
    assert done(cli, "mask", "apply", "masks/one.safetensors", other, "-o", "masked", "-q") == "masked"
    after, before = tensors(tmp_path / "masked"), tensors(other)
    assert after.keys() == before.keys() == sparse.keys()
    for name, tensor in after.items():
        zero = (sparse[name] == 0) & torch.tensor(name in expected)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, before[name].masked_fill(zero, 0))
    left = {path.name for path in other.iterdir()} - {"model.safetensors"}
    assert left <= {path.name for path in (tmp_path / "masked").iterdir()}
    assert not [path.name for path in (tmp_path / "masked").iterdir() if path.name.startswith(".")]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "masked", dtype=torch.float32)
    assert loaded(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_zeros_elsewhere_are_no_masks(cli: Cli, zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    """A padding row of the embedding, a bias: they are not where a checkpoint was pruned."""
    result = pruned(zoo("opt"), tokens, tmp_path / "result")
    path = result / "model-00001-of-00003.safetensors"
    held = load_file(path)
    embedding = next(name for name in held if "embed_tokens" in name)
    held[embedding][0] = 0
    save_file(held, path, metadata={"format": "pt"})
    done(cli, "mask", "export", result, "-o", "masks.safetensors")
    shapes = MaskFile.open(tmp_path / "masks.safetensors").shapes
    assert len(shapes) == len(ZOO["opt"].matrices) and all(name.endswith(".weight") for name in shapes)
    assert embedding not in shapes


def test_a_report_is_not_carried_to_weights_it_is_not_about(cli: Cli, zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    result = pruned(zoo("llama"), tokens, tmp_path / "result")
    done(cli, "mask", "export", result, "-o", "masks.safetensors")
    found = json.loads(done(cli, "mask", "apply", "masks.safetensors", result, "-o", "same", "--json"))
    assert found["removed"] == 0
    assert (result / REPORT).is_file() and not (tmp_path / "same" / REPORT).exists()
    same = tensors(tmp_path / "same")
    assert all(torch.equal(x, same[name]) for name, x in tensors(result).items())


def test_bad_input_is_refused_and_nothing_is_touched(cli: Cli, zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    source = zoo("llama")
    assert "is dense" in refused(cli, "mask", "export", source, "-o", "masks.safetensors")
    result = pruned(source, tokens, tmp_path / "result")
    done(cli, "mask", "export", result, "-o", "masks.safetensors")
    assert "--force" in refused(cli, "mask", "export", result, "-o", "masks.safetensors")
    assert "choose another -o" in refused(cli, "mask", "export", result, "-o", "result", "--force")
    done(cli, "mask", "export", result, "-o", "masks.safetensors", "--force")

    said = refused(cli, "mask", "apply", "masks.safetensors", zoo("qwen3"), "-o", "masked")
    assert "does not fit" in said and "64 x 32 there and 32 x 32 in the masks" in said and "more" in said
    assert not Path("masked").exists()
    assert "which is read" in refused(cli, "mask", "apply", "masks.safetensors", source, "-o", tmp_path)
    assert "there is no directory" in refused(cli, "mask", "apply", "masks.safetensors", "./none", "-o", "masked")
    assert "no safetensors" in refused(cli, "mask", "apply", source / "config.json", source, "-o", "masked")
    done(cli, "mask", "apply", "masks.safetensors", source, "-o", "masked")
    assert "--force or another -o" in refused(cli, "mask", "apply", "masks.safetensors", source, "-o", "masked")
    done(cli, "mask", "apply", "masks.safetensors", source, "-o", "masked", "--force")
    former = {path: path.read_bytes() for path in result.iterdir()}
    assert "--force or another -o" in refused(cli, "mask", "apply", "masks.safetensors", source, "-o", "result")
    assert former == {path: path.read_bytes() for path in result.iterdir()}


def test_masks_of_the_demo_and_of_a_packed_result(cli: Cli, zoo: Zoo, tokens: Path, tmp_path: Path) -> None:
    assert "is dense" in refused(cli, "mask", "export", "demo", "-o", "masks.safetensors")
    result = pruned(zoo("llama"), tokens, tmp_path / "result", "2:4")
    done(cli, "pack", result, "-o", "packed")
    done(cli, "mask", "export", result, "-o", "masks.safetensors")
    done(cli, "mask", "export", "packed", "-o", "same.safetensors")
    assert Path("masks.safetensors").read_bytes() == Path("same.safetensors").read_bytes()
    said = refused(cli, "mask", "apply", "masks.safetensors", "packed", "-o", "packed", "--force")
    assert "packed, which is read" in said
    done(cli, "pack", tuned(zoo("llama"), tmp_path / "other"), "-o", "small")
    done(cli, "mask", "apply", "masks.safetensors", "small", "-o", "masked")
    done(cli, "mask", "apply", "masks.safetensors", "other", "-o", "expected")
    assert shards(tmp_path / "masked") == shards(tmp_path / "expected")
    assert Path("masked/config.json").read_bytes() == Path("other/config.json").read_bytes()
